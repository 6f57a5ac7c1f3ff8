"""Compute 95 % intervals: of means, by Student's t because seeds are few, and of shares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The .975 quantile for 1, 2, … 30 degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds; ``margin`` is half its 95 % interval, None where n is 1."""

    mean: float
    margin: float | None
    n: int

    def covers_zero(self) -> bool:
        """Return whether the interval does not tell the mean from 0."""
        return self.margin is None or abs(self.mean) <= self.margin


def t_quantile(degrees: int) -> float:
    """Return the .975 quantile of Student's t, to four digits.

    Above 30 degrees of freedom by the expansion of Abramowitz and Stegun, 26.7.5.
    """
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and t-interval of independent values, one a seed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to average")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def paired_difference(values: Mapping[Any, float], base: Mapping[Any, float]) -> Estimate | None:
    """Return the mean of value − base over the common seeds or problems; None where none is common.

    Both share data and teacher at a seed, so their difference varies less than either. A value for
    all seeds (its key is None) is compared with the other at each of its seeds.
    """
    if None in values and base:
        values = dict.fromkeys(base, values[None])
    elif None in base and values:
        base = dict.fromkeys(values, base[None])
    common = [seed for seed in values if seed in base]
    return estimate([values[s] - base[s] for s in common]) if common else None


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent trials, within 0 and 1.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209–212.
    """
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(middle - reach, 0.0), min(middle + reach, 1.0)
