"""Draw small charts as SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from shared.errors import ConfigurationError
from student_trainer.reporting.axes import axis_of, format_number, ticks

# Blue, orange, violet, teal, magenta and brown; green and red say right and wrong.
COLOURS = ("#2563c9", "#b85c06", "#8a3ffc", "#0b7285", "#b3255c", "#7a5230")
TEACHER = -1  # the number of the teacher's lines, which are grey
_NEUTRAL = "#59636e"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 62, 150, 36, 40
_DASHES = ("", "7 3", "2 2", "10 3 2 3", "5 2 2 2 2 2")
_POINTS = 600  # of a line, about two a pixel
_ZOOM = 3
# By name, because the library that draws PNG takes sans-serif for Arial, and leaves the text out
# where that is missing.
_FONTS = "Arial, Helvetica, Liberation Sans, DejaVu Sans, Noto Sans, sans-serif"
LINES_SIZE = (340, 224)
LINES_FRAME = (46, 328, 24, 182)  # left, right, top and bottom of the drawn area

Point = tuple[float, float]

# A label, a mean, and half its interval where there is one.
Interval = tuple[str, float, float | None]


def write_chart(
    path: Path,
    title: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    floor: float,
) -> None:
    """Write lines over a logarithmic x of powers of two and a logarithmic y.

    Args:
        series: (x, y) points by name; y below ``floor`` is drawn at it.
        floor: a power of ten.
    """
    points = [point for line in series.values() for point in line]
    x_high = math.log2(max(x for x, _ in points))
    y_low = round(math.log10(floor))
    y_high = math.ceil(math.log10(max(y for _, y in points)))
    y_high = max(y_high, y_low + 1)

    def across(x: float) -> float:
        return _LEFT + math.log2(x) / x_high * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        share = (math.log10(max(y, floor)) - y_low) / (y_high - y_low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = _scales(
        {f"1e{power}": up(10.0**power) for power in range(y_low, y_high + 1)},
        {str(2**power): across(2**power) for power in range(round(x_high) + 1)},
        x_label,
    )
    for number, line in enumerate(series.values()):
        parts.append(_line(number, [(across(x), up(y)) for x, y in line]))
    _write(path, title, [*parts, *_legend(list(series))], _HEIGHT)


def write_interval_chart(
    path: Path, title: str, x_label: str, series: Mapping[str, Sequence[Interval]]
) -> None:
    """Write means and intervals over evenly spaced labels, in order of appearance."""
    labels = list(dict.fromkeys(label for line in series.values() for label, _, _ in line))
    marks, up = _linear([point for line in series.values() for point in line])
    step = (_WIDTH - _LEFT - _RIGHT) / len(labels)

    def across(label: str, number: int) -> float:
        aside = 7 * (number - (len(series) - 1) / 2)  # keeps the bars from covering each other
        return _LEFT + step * (labels.index(label) + 0.5) + aside

    middle = (len(series) - 1) / 2
    parts = _scales(marks, {label: across(label, 0) + 7 * middle for label in labels}, x_label)
    for number, line in enumerate(series.values()):
        parts.append(_line(number, [(across(label, number), up(mean)) for label, mean, _ in line]))
        for label, mean, margin in line:
            x, reach = across(label, number), margin or 0.0
            parts += _bar(number, (x, up(mean - reach)), (x, up(mean + reach)), (x, up(mean)))
    _write(path, title, [*parts, *(_legend(list(series)) if len(series) > 1 else [])], _HEIGHT)


def write_interval_rows(path: Path, title: str, rows: Sequence[Interval]) -> None:
    """Write means and intervals, one below the other, for things that have no order."""
    height = _TOP + _BOTTOM + 22 * len(rows)
    left = 170
    marks, place = _linear(rows, start=left, end=_WIDTH - 20)
    parts = []
    for label, x in marks.items():
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" '
            'stroke="#d1d9e0"/>'
            f'<text x="{x:.1f}" y="{height - 20}" text-anchor="middle">{label}</text>'
        )
    for number, (label, mean, margin) in enumerate(rows):
        y, reach = _TOP + 22 * (number + 0.5), margin or 0.0
        parts.append(
            f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        parts += _bar(0, (place(mean - reach), y), (place(mean + reach), y), (place(mean), y))
    _write(path, title, parts, height)


def draw_lines(
    series: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    *,
    share: bool = False,
    numbers: Mapping[str, int] | None = None,
) -> str:
    """Return lines through (x, y) points, of `LINES_SIZE`; "" where no y is finite.

    x begins at 0, or at its least value where that is below; y fits what is drawn, see `axis_of`.
    The elements have the classes c0 to c5, ct, grid and line, which the page or the file styles.

    Args:
        share: y is a share, written in percent.
        numbers: of the colour and dashes of each line, `TEACHER` for the teacher's; default: their
            order.
    """
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    height = LINES_SIZE[1]
    left, right, top, bottom = LINES_FRAME
    x_low, x_high = min(0.0, *(x for x, _ in points)), max(x for x, _ in points)
    x_high = x_high if x_high > x_low else x_low + 1
    axis = axis_of([y for _, y in points], share=share)
    scale = math.log if axis.logarithmic else float

    def place(x: float, y: float) -> Point:
        y = min(max(y, axis.low), axis.high)
        across = (x - x_low) / (x_high - x_low) * (right - left)
        up = (scale(y) - scale(axis.low)) / (scale(axis.high) - scale(axis.low))
        return left + across, bottom - up * (bottom - top)

    parts = []
    for label, tick in axis.ticks.items():
        y = place(x_low, tick)[1]
        parts.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in ticks(x_low, x_high, integers=True):
        x = place(tick, axis.low)[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,.0f}</text>')
    unit = " ".join(word for word in (axis.factor, y_label) if word)
    unit += ", logarithmic" if axis.logarithmic else ""
    unit += ", not from 0" if axis.cut else ""
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text x="4" y="12">{escape(unit)}</text>'
    )
    found = dict(zip(series, range(len(series)), strict=True)) if numbers is None else numbers
    for name, line in series.items():
        places = [place(x, y) for x, y in thinned([p for p in line if math.isfinite(p[1])])]
        if not places:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = dashes(found[name])
        style = f' stroke-dasharray="{dash}"' if dash else ""
        colour, (x, y) = colour_class(found[name]), places[-1]
        parts.append(
            f'<polyline class="line {colour}" points="{path}"{style}>'
            f"<title>{escape(name)}</title></polyline>"
            f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        )
    return "".join(parts)


def describe_lines(series: Mapping[str, Sequence[Point]], x_label: str, *, share: bool) -> str:
    """Return in words what `draw_lines` shows, for whoever does not see it."""
    sentences = []
    for name, line in series.items():
        known = [(x, y) for x, y in line if math.isfinite(y)]
        if known:
            (first, start), (last, end) = known[0], known[-1]
            low, high = min(y for _, y in known), max(y for _, y in known)
            begin, stop, least, most = (
                format_number(y, share=share) for y in (start, end, low, high)
            )
            sentences.append(
                f"{name}: {begin} at {x_label} {first:,.0f}, {stop} at {x_label} {last:,.0f}, "
                f"lowest {least}, highest {most}."
            )
    return " ".join(sentences)


def colour_class(number: int) -> str:
    """Return the class of the colour with that number; six colours repeat."""
    return "ct" if number == TEACHER else f"c{number % len(COLOURS)}"


def dashes(number: int) -> str:
    """Return the stroke-dasharray of the line with that number, "" for a solid one.

    There are five for six colours, so that thirty lines differ.
    """
    return "4 3" if number == TEACHER else _DASHES[number % len(_DASHES)]


def thinned(line: Sequence[Point]) -> Sequence[Point]:
    """Return at most `_POINTS` points: the least and the greatest y of neighbours."""
    if len(line) <= _POINTS:
        return line
    size = math.ceil(2 * len(line) / _POINTS)
    kept = []
    for start in range(0, len(line), size):
        part = range(start, min(start + size, len(line)))
        ends = (min(part, key=lambda i: line[i][1]), max(part, key=lambda i: line[i][1]))
        kept += [line[i] for i in sorted({*ends})]
    return [*kept, line[-1]] if kept[-1] != line[-1] else kept


def write_lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Point]],
    *,
    note: str = "",
    share: bool = False,
    numbers: Mapping[str, int] | None = None,
) -> None:
    """Write `draw_lines` as a file for print: title above, legend and note below.

    Args:
        note: what is good, as one sentence.
    """
    width, height = LINES_SIZE
    found = dict(zip(series, range(len(series)), strict=True)) if numbers is None else numbers
    look = [".grid{stroke:#d1d9e0}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}"]
    for name, colour in {**{f"c{i}": c for i, c in enumerate(COLOURS)}, "ct": _NEUTRAL}.items():
        look.append(f".line.{name}{{stroke:{colour}}}.dot.{name}{{fill:{colour}}}")
    rows: list[str] = []
    y = height + 44
    for name, line in series.items():
        if not line:
            continue
        colour, dash = colour_class(found[name]), dashes(found[name]) or "none"
        rows.append(
            f'<polyline class="line {colour}" stroke-dasharray="{dash}" '
            f'points="48,{y - 4} 74,{y - 4}"/>'
            f'<text x="80" y="{y}">{escape(name)} {format_number(line[-1][1], share=share)}</text>'
        )
        y += 16
    for row in textwrap.wrap(note, 58):
        rows.append(f'<text x="12" y="{y}" font-size="10" fill="#59636e">{escape(row)}</text>')
        y += 13
    drawn = draw_lines(series, x_label, y_label, share=share, numbers=found)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" role="img" '
        f'font-family="{_FONTS}" font-size="11"><title>{escape(title)}</title>'
        f"<desc>{escape(describe_lines(series, x_label, share=share))} {escape(note)}</desc>"
        f"<style>{''.join(look)}</style>\n"
        f'<rect width="{width}" height="{y}" fill="#fff"/>'
        f'<text x="12" y="20" font-size="13" font-weight="600">{escape(title)}</text>\n'
        f'<g transform="translate(0 28)">{drawn}</g>\n' + "\n".join(rows) + "\n</svg>\n",
        encoding="utf-8",
    )


def check_png() -> None:
    """Check that `write_png` can draw, text too.

    Raises:
        ConfigurationError: the library is missing, or the machine has no font.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise ConfigurationError(
            "--png: resvg-py is missing, which draws SVG as PNG: pip install 'sparse-gkd[png]'"
        ) from error
    empty = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20">{}</svg>'
    letter = f'<text y="15" font-family="{_FONTS}">x</text>'
    if svg_to_bytes(empty.format(letter)) == svg_to_bytes(empty.format("")):
        raise ConfigurationError(
            f"--png: none of the fonts {_FONTS} is there, and charts would have no text: install "
            "one, as by apt-get install fonts-dejavu-core"
        )


def write_png(svg: Path) -> Path:
    """Write an SVG file as PNG beside it, at three times its size, and return its path."""
    from resvg_py import svg_to_bytes

    path = svg.with_suffix(".png")
    path.write_bytes(svg_to_bytes(svg_path=str(svg), zoom=_ZOOM))
    return path


def _linear(
    points: Sequence[Interval],
    *,
    start: float = _HEIGHT - _BOTTOM,
    end: float = _TOP,
) -> tuple[dict[str, float], Callable[[float], float]]:
    """Return the marks of a linear scale that holds all intervals, and its function."""
    low = min(mean - (margin or 0.0) for _, mean, margin in points)
    high = max(mean + (margin or 0.0) for _, mean, margin in points)
    room = 0.06 * (high - low) or 0.05
    low, high = low - room, high + room

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    return {f"{tick:g}": place(tick) for tick in ticks(low, high)}, place


def _scales(y: Mapping[str, float], x: Mapping[str, float], x_label: str) -> list[str]:
    """Return grid lines with their labels, labels along x, and what x is."""
    parts = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d1d9e0"/>'
        f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'
        for label, at in y.items()
    ]
    parts += [
        f'<text x="{at:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{escape(label)}</text>'
        for label, at in x.items()
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _line(number: int, places: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    colour = COLOURS[number % len(COLOURS)]
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _bar(
    number: int, low: tuple[float, float], high: tuple[float, float], mean: tuple[float, float]
) -> list[str]:
    colour = COLOURS[number % len(COLOURS)]
    return [
        f'<line x1="{low[0]:.1f}" y1="{low[1]:.1f}" x2="{high[0]:.1f}" y2="{high[1]:.1f}" '
        f'stroke="{colour}"/>',
        f'<circle cx="{mean[0]:.1f}" cy="{mean[1]:.1f}" r="3.5" fill="{colour}"/>',
    ]


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        y = _TOP + 14 + 18 * number
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<rect x="{_WIDTH - _RIGHT + 12}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{_WIDTH - _RIGHT + 28}" y="{y}">{escape(name)}</text>'
        )
    return parts


def _write(path: Path, title: str, parts: Sequence[str], height: int) -> None:
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{20}" y="20" font-size="13" font-weight="600">{escape(title)}</text>',
    )
    path.write_text("\n".join([*start, *parts, "</svg>"]) + "\n")
