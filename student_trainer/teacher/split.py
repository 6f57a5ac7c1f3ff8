"""The splitting of many sequences into requests within the teacher's limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from operator import add, gt
from typing import TypeVar

from shared.errors import DeadlineExceededError, PayloadTooLargeError

logger = logging.getLogger(__name__)

R = TypeVar("R")


def split_and_send(
    costs: Sequence[tuple[int, ...]],
    limits: tuple[int, ...],
    send: Callable[[int, int], list[R]],
) -> list[R]:
    """Send all sequences in requests within the limits, and return the answers in order.

    A request that is still too large (413) or not answered in time (504, or the client's own
    timeout while the teacher is ready) is sent again in halves.

    Args:
        costs: costs of each sequence in several units; the second is tokens.
        limits: largest sum of each unit in one request.
        send: returns the answers for the sequences [first, last).

    Raises:
        PayloadTooLargeError, DeadlineExceededError: one sequence alone is too much.
    """
    answers: list[R] = []
    parts = split(costs, limits)[::-1]  # reversed, because `pop` takes from the end
    while parts:
        first, last = parts.pop()
        try:
            answers += send(first, last)
        except (PayloadTooLargeError, DeadlineExceededError) as error:
            if last - first == 1:
                raise type(error)(
                    f"sequence {first}, of {costs[first][1]} tokens, is too much alone: "
                    f"{error.detail}. Lower --max_length, --max_new_tokens or --top_k_logprobs, or "
                    "raise --teacher_timeout, --request-timeout (504) or --max-request-bytes (413) "
                    "of the server, or the limits of a gateway before it"
                ) from error
            middle = (first + last) // 2
            logger.warning("A request of %d is sent in halves: %s", last - first, error.detail)
            parts += [(middle, last), (first, middle)]
    return answers


def split(costs: Sequence[tuple[int, ...]], limits: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return ranges [first, last) whose summed costs are within ``limits``, or of one sequence."""
    ranges: list[tuple[int, int]] = []
    first, total = 0, (0,) * len(limits)
    for index, cost in enumerate(costs):
        total = tuple(map(add, total, cost))
        if index > first and any(map(gt, total, limits)):
            ranges.append((first, index))
            first, total = index, cost
    if costs:
        ranges.append((first, len(costs)))
    return ranges
