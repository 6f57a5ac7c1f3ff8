"""Which samples of an optimizer step share a micro-batch: told by their lengths alone.

Samples of like lengths stand together, so that padding is little. The step's gradient is normalised
by all its tokens, so how they are grouped changes it by rounding only. Longest first, so that a
step that does not fit the memory fails in its first pass; or, where the student wrote them,
shortest first: they were written first, and so scored first. Either way ranks meet micro-batches
of about their own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def order_by_length(lengths: Sequence[int], *, shortest_first: bool = False) -> list[int]:
    """Indices of the samples; those of equal length as they come."""
    sign = 1 if shortest_first else -1
    return sorted(range(len(lengths)), key=lambda index: sign * lengths[index])


def group_by_sizes(
    lengths: Sequence[int], sizes: Sequence[int], *, shortest_first: bool = False
) -> list[list[int]]:
    """Indices of the samples, as many in each micro-batch as ``sizes`` says."""
    order = order_by_length(lengths, shortest_first=shortest_first)
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def group_within_budget(
    lengths: Sequence[int], budget: int, *, packed: bool, shortest_first: bool = False
) -> list[list[int]]:
    """Indices of the samples, in the fewest micro-batches of at most ``budget`` tokens.

    Neighbours in length stand together; among equally few micro-batches, those with the least
    padding. A sample longer than the budget is alone.

    Args:
        packed: a micro-batch counts its own tokens; else rows times the longest.
    """
    order = order_by_length(lengths, shortest_first=shortest_first)
    # For the first n of the order: (micro-batches, tokens, where the last of them begins).
    best = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        choices: list[tuple[int, int, int]] = []
        own = 0
        for start in range(end - 1, -1, -1):
            own += lengths[order[start]]
            longest = max(lengths[order[start]], lengths[order[end - 1]])
            tokens = own if packed else longest * (end - start)
            if tokens > budget and choices:
                break
            choices.append((best[start][0] + 1, best[start][1] + tokens, start))
        best.append(min(choices))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][2]
        groups.insert(0, order[start:end])
        end = start
    return groups


def split_to_count(groups: Sequence[list[int]], count: int) -> list[list[int]]:
    """``count`` micro-batches, by halving those of the most samples: ranks must have equally many.

    Raises:
        ValueError: there are fewer samples than that.
    """
    split = list(groups)
    while len(split) < count:
        place = max(range(len(split)), key=lambda index: len(split[index]))
        whole = split[place]
        if len(whole) < 2:
            raise ValueError(
                f"another rank needs {count} micro-batches, here are {len(split)} samples; "
                "ranks must have equally many (accelerate's even_batches)"
            )
        split[place : place + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return split


def assign_to_substeps(micro_batches: Sequence[T], count: int) -> list[list[T]]:
    """The micro-batches over the ``count`` substeps that the Trainer makes of an optimizer step.

    One each and the rest in the last, which alone adds gradients over ranks; where there are fewer
    than substeps, some are empty, but never the last.
    """
    single = min(len(micro_batches), count) - 1
    empty: list[list[T]] = [[] for _ in range(count - 1 - single)]
    return [*([one] for one in micro_batches[:single]), *empty, list(micro_batches[single:])]
