"""Choose the scale of a chart, its round marks, and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LOGARITHMIC = 50  # times the least value that the greatest is, from which a scale is logarithmic
_NARROW = 0.3  # of the greatest value that the values span, below which a scale leaves out 0
_LEAST_SHARE = 0.1  # that a scale of shares spans, so that noise does not fill a chart
_MARKS = 7  # on a logarithmic scale, at most


@dataclass(frozen=True)
class Axis:
    """The ends of a scale and its ticks, label -> value; ``factor`` stands before the unit.

    Attributes:
        cut: it leaves out 0, though it is not logarithmic.
    """

    low: float
    high: float
    ticks: Mapping[str, float]
    logarithmic: bool = False
    factor: str = ""
    cut: bool = False


def axis_of(values: Sequence[float], *, share: bool = False) -> Axis:
    """Return the scale that the values fill.

    It is logarithmic where they are positive and span a factor of `_LOGARITHMIC`. Else it begins at
    0, or at their least value where that is below; but not where they lie close together far above
    0, as their course would be a flat line.

    Args:
        share: the values are shares, written in percent.
    """
    low, high = min(values), max(values)
    if share:
        return _of_shares(low, high)
    if low > 0 and high / low > _LOGARITHMIC:
        return _logarithmic(low, high)
    cut = low > 0 and 0 < high - low < _NARROW * high
    if not cut:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    power = math.floor(math.log10(max(-low, high)))
    power = power if power < -3 or power > 5 else 0
    unit = 10.0**power
    found = _rounded_ticks(low, high)
    low, high = found[0], found[-1]
    marks = {f"{round(tick / unit, 9):,.10g}": tick for tick in found}
    return Axis(low, high, marks, factor=_power(power) if power else "", cut=cut and low > 0)


def _of_shares(low: float, high: float) -> Axis:
    missing = max(_LEAST_SHARE - (high - low), 0.0)
    found = _rounded_ticks(max(low - missing / 2, 0.0), min(high + missing / 2, 1.0))
    marks = {f"{100 * tick:g} %": tick for tick in found}
    return Axis(found[0], found[-1], marks, cut=found[0] > 0)


def _logarithmic(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [
        float(f"{m}e{power}") for power in range(first, last + 1) for m in (1, 2, 5)
    ]  # fmt: skip
    low = max(step for step in steps if step <= low)
    high = min(step for step in steps if step >= high)
    inside = [step for step in steps if low <= step <= high]
    if len(inside) > _MARKS:
        inside = [step for step in inside if f"{step:e}".startswith("1")]
        inside = inside[:: math.ceil(len(inside) / 6)]
    if first > -4 and last < 5:
        return Axis(low, high, {format_number(step): step for step in inside}, logarithmic=True)
    marks = {}
    for step in inside:
        digit, power = f"{step:.0e}".split("e")
        marks[(f"{digit} × " if digit != "1" else "") + _power(int(power))] = step
    return Axis(low, high, marks, logarithmic=True)


def _rounded_ticks(low: float, high: float) -> list[float]:
    """Return ticks from the next one at or below low to the next one at or above high."""
    step = _step(low, high)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def ticks(low: float, high: float, count: int = 4, *, integers: bool = False) -> list[float]:
    """Return round numbers between low and high: multiples of 1, 2 or 5 × 10^n."""
    step = _step(low, high, count, least=1.0 if integers else 0.0)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _step(low: float, high: float, count: int = 4, least: float = 0.0) -> float:
    rough = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough)


def format_number(value: float, *, share: bool = False) -> str:
    """Return a number with three digits as people write it: 12,300, 0.0042, 5.3 × 10⁻⁶, 98.1 %.

    Its spaces do not break.
    """
    if not math.isfinite(value):
        return str(value)
    if share:
        percent = 100 * value
        digits = 1 if abs(percent) >= 0.05 or percent == 0 else 3
        return f"{percent:.{digits}f}".removesuffix(".0") + "\u00a0%"
    if value and not 1e-4 <= abs(value) < 1e7:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}\u00a0×\u00a0{_power(int(power))}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):f}".rstrip("0").rstrip(".")


def _power(power: int) -> str:
    """Return a power of ten with its exponent raised."""
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
