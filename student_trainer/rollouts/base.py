"""What a rollout engine is asked and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt [P] uint32 and the key of its randomness.

    Equal keys give equal completions, whatever else is in the batch or on other ranks.
    """

    prompt_ids: NDArray[np.uint32]
    key: tuple[int | str, ...]


@dataclass(frozen=True)
class Rollout:
    """One completion [T] uint32, its stop token included; truncated when it never stopped."""

    token_ids: NDArray[np.uint32]
    truncated: bool


class RolloutEngine(Protocol):
    """Generates with the student's present weights."""

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """Groups of (index of the request, rollout), each as soon as it is finished.

        The number of groups depends only on the number of requests, so that ranks which share a
        sharded model stay in step.
        """
        ...
