"""Small line charts as SVG files, for docs/."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

COLOURS = ("#2563c9", "#c8650a", "#1a7f37", "#8a3ffc", "#b3255c", "#0b7285")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 62, 150, 36, 40


def write_chart(
    path: Path,
    title: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    floor: float,
) -> None:
    """Lines over a logarithmic x of powers of two and a logarithmic y.

    Args:
        series: (x, y) points by name; y below ``floor`` is drawn at it.
        floor: a power of ten.
    """
    points = [point for line in series.values() for point in line]
    x_high = math.log2(max(x for x, _ in points))
    y_low = round(math.log10(floor))
    y_high = math.ceil(math.log10(max(y for _, y in points)))
    y_high = max(y_high, y_low + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log2(x) / x_high * (_WIDTH - _LEFT - _RIGHT)
        share = (math.log10(max(y, floor)) - y_low) / (y_high - y_low)
        return _LEFT + across, _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" font-size="13" font-weight="600">{escape(title)}</text>',
    ]
    for power in range(y_low, y_high + 1):
        y = place(1, 10.0**power)[1]
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#d1d9e0"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'
        )
    for power in range(round(x_high) + 1):
        x = place(2**power, floor)[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{2**power}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path_points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(
            f'<polyline points="{path_points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        y = _TOP + 14 + 18 * number
        parts.append(
            f'<rect x="{_WIDTH - _RIGHT + 12}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{_WIDTH - _RIGHT + 28}" y="{y}">{escape(name)}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
