"""What a rollout engine is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.text import Ids, StopSearch

# Begins to look for stop strings in the completion of a prompt [P].
StartSearch = Callable[[Ids], StopSearch]


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt [P] uint32 and the key of its randomness.

    Equal keys draw equal random numbers, whatever else is in the batch or on other ranks. The
    completions are then equal too, but for rounding: how a matrix product is summed depends on the
    shape of the batch, and a draw that falls within that difference takes the neighbouring token.
    In float32 that is rare (measured on random models: one token in 20,000 to 350,000); in half
    precision, whose rounding is coarser, expect it more often.
    """

    prompt_ids: NDArray[np.uint32]
    key: tuple[int | str, ...]


@dataclass(frozen=True)
class Rollout:
    """One completion [T] uint32, its stop token included; truncated when it never stopped."""

    token_ids: NDArray[np.uint32]
    truncated: bool


class RolloutEngine(Protocol):
    """Generates with the student's weights as of the last `sync`.

    Attributes:
        elsewhere: in other processes, with weights of its own: `generate` may run in a thread while
            the student trains. It must have ended before the next `sync` or `generate`.
    """

    elsewhere: bool

    def sync(self, weight_version: int) -> None:
        """Take the student's present weights; costs nothing when this version is there already."""
        ...

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """Groups of (index of the request, rollout), each as soon as it is finished.

        How many groups there are, and when, differs between ranks. Where ranks share a sharded
        model, the caller must not run it between groups, unless the engine was told to give one.
        """
        ...
