"""The ranks that share one vLLM engine, and what they tell one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from shared.errors import RolloutError

T = TypeVar("T")
R = TypeVar("R")


class EngineGroup:
    """The neighbouring ranks that share an engine, the first of which leads it.

    All ranks of the run make theirs together. Calls within a group go over gloo, so a thread may
    make them while the student trains over NCCL.

    Args:
        size: ranks that share an engine; it divides the ranks of each machine.

    Attributes:
        leads: whether this rank has the engine.
    """

    def __init__(self, size: int = 1) -> None:
        joined = dist.is_initialized()
        self._rank = dist.get_rank() if joined else 0
        self._world = dist.get_world_size() if joined else 1
        self._first = self._rank - self._rank % size
        self._size = size
        self._group: Any = None
        self.leads = self._rank == self._first
        if size > 1:  # every rank takes part in making every group
            for first in range(0, self._world, size):
                group = dist.new_group(list(range(first, first + size)), backend="gloo")
                if first == self._first:
                    self._group = group

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks of the group."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def spread(
        self, items: Sequence[T], work: Callable[[list[T]], Iterator[tuple[int, R]]]
    ) -> Iterator[tuple[int, R]]:
        """Yield (index of the item, result) of this rank's items, which the leader works on.

        Args:
            work: takes the items of the whole group, and gives each result with its index there.

        Raises:
            RolloutError: as ``work`` on the leader, on each rank that still waits.
        """
        of_ranks = self.gather(items)
        if not self.leads:
            for _ in items:
                answer = self._receive()
                if isinstance(answer, RolloutError):
                    raise answer
                yield answer
            return
        owners = [(place, index) for place, own in enumerate(of_ranks) for index in range(len(own))]
        missing = [len(own) for own in of_ranks]
        try:
            for number, result in work([item for own in of_ranks for item in own]):
                place, index = owners[number]
                missing[place] -= 1
                if place == 0:
                    yield index, result
                else:
                    self._send((index, result), place)
        except RolloutError as error:
            for place in range(1, self._size):
                if missing[place]:
                    self._send(error, place)
            raise

    def _send(self, value: object, place: int) -> None:
        dist.send_object_list([value], self._first + place, group=self._group)

    def _receive(self) -> Any:
        held: list[Any] = [None]
        dist.recv_object_list(held, self._first, group=self._group)
        return held[0]
