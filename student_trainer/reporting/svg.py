"""Draw small charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

COLOURS = ("#2563c9", "#c8650a", "#1a7f37", "#8a3ffc", "#b3255c", "#0b7285")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 62, 150, 36, 40
_LOGARITHMIC = 50
_DASHES = ("", "6 3", "2 3")  # of the lines beyond the number of colours
LINES_SIZE = (420, 240)

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


def draw_lines(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    """Return lines through (x, y) points, of `LINES_SIZE`; "" where no y is finite.

    y is logarithmic where it is positive and spans more than a factor of `_LOGARITHMIC`. A series
    without points draws nothing and keeps its colour. The elements have the classes c0 to c5, grid
    and line, which the page or the file styles.
    """
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    width, height = LINES_SIZE
    left, right, top, bottom = 62, 12, 12, 40
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([y for _, y in points])
    logarithmic = y_low > 0 and y_high / y_low > _LOGARITHMIC
    scale = math.log if logarithmic else float

    def place(x: float, y: float) -> Point:
        across = (x - x_low) / (x_high - x_low) * (width - left - right)
        share = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return left + across, height - bottom - share * (height - top - bottom)

    parts = []
    for tick in _powers(y_low, y_high) if logarithmic else ticks(y_low, y_high):
        y = place(x_low, tick)[1]
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in ticks(x_low, x_high):
        x = place(tick, y_low)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for number, (name, line) in enumerate(series.items()):
        places = [place(x, y) for x, y in line if math.isfinite(y)]
        if not places:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(
            f'<polyline class="line c{number % len(COLOURS)}" points="{path}"{style}>'
            f"<title>{escape(name)}</title></polyline>"
        )
        if len(places) == 1:
            x, y = places[0]
            colour = number % len(COLOURS)
            parts.append(f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    return "".join(parts)


def write_lines(
    path: Path, title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]
) -> None:
    """Write `draw_lines` as a file for print, with its title above and its legend below."""
    width, height = LINES_SIZE
    look = [".grid{stroke:#d1d9e0}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}"]
    for number, colour in enumerate(COLOURS):
        look.append(f".line.c{number}{{stroke:{colour}}}.dot.c{number}{{fill:{colour}}}")
    legend: list[str] = []
    for number, (name, line) in enumerate(series.items()):
        if not line:
            continue
        x, y = 62 + 170 * (len(legend) % 2), height + 44 + 16 * (len(legend) // 2)
        dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
        legend.append(
            f'<polyline class="line c{number % len(COLOURS)}" stroke-dasharray="{dash or "none"}" '
            f'points="{x},{y - 4} {x + 20},{y - 4}"/>'
            f'<text x="{x + 26}" y="{y}">{escape(name)}</text>'
        )
    whole = height + 36 + 16 * math.ceil(len(legend) / 2)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" '
        f'font-family="sans-serif" font-size="11"><style>{"".join(look)}</style>\n'
        f'<rect width="{width}" height="{whole}" fill="#fff"/>'
        f'<text x="20" y="20" font-size="13" font-weight="600">{escape(title)}</text>\n'
        f'<g transform="translate(0 28)">{draw_lines(series, x_label, y_label)}</g>\n'
        + "\n".join(legend)
        + "\n</svg>\n"
    )


def _powers(low: float, high: float) -> list[float]:
    """Return the powers of ten between low and high."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]


def _range(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers between low and high: multiples of 1, 2 or 5 × 10^n."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


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
