"""The grouping of an optimizer step's samples into micro-batches, by their lengths alone.

Samples of similar length are grouped, so there is little padding. The gradient is normalised by all
tokens of the step, so the grouping changes it by rounding only. The longest come first, so that a
step that does not fit the memory fails in its first pass. Completions of the student come shortest
first, because these were written and scored first. Either way, micro-batches that ranks compute at
the same time have similar sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def order_by_length(lengths: Sequence[int], *, shortest_first: bool = False) -> list[int]:
    """Return the indices of the samples sorted by length, equal lengths in the given order."""
    sign = 1 if shortest_first else -1
    return sorted(range(len(lengths)), key=lambda index: sign * lengths[index])


def group_by_sizes(
    lengths: Sequence[int], sizes: Sequence[int], *, shortest_first: bool = False
) -> list[list[int]]:
    """Return the indices of the samples in micro-batches of the given ``sizes``."""
    order = order_by_length(lengths, shortest_first=shortest_first)
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def group_within_budget(
    lengths: Sequence[int], budget: int, *, packed: bool, shortest_first: bool = False
) -> list[list[int]]:
    """Return the indices of the samples in the fewest micro-batches of at most ``budget`` tokens.

    A micro-batch holds neighbours in length; of equally few micro-batches, those with the least
    padding are taken. A sample longer than the budget is alone.

    Args:
        packed: count a micro-batch's own tokens; else samples times the longest length.
    """
    order = order_by_length(lengths, shortest_first=shortest_first)
    # best[n] is (micro-batches, tokens, start of the last micro-batch) for the first n samples.
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
    """Return ``count`` micro-batches, made by halving those with the most samples.

    Ranks must have the same number of micro-batches.

    Raises:
        ValueError: there are fewer samples than ``count``.
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
    """Return the micro-batches of each of the ``count`` substeps of the Trainer's optimizer step.

    Each substep has one, and the last one the rest, because it alone reduces gradients over ranks.
    With fewer micro-batches than substeps some substeps are empty, but never the last.
    """
    single = min(len(micro_batches), count) - 1
    empty: list[list[T]] = [[] for _ in range(count - 1 - single)]
    return [*([one] for one in micro_batches[:single]), *empty, list(micro_batches[single:])]
