"""The processes of a run, which learn one model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from shared.errors import (
    ProtocolError,
    RolloutServerError,
    TeacherError,
    TeacherUnreachableError,
)

T = TypeVar("T")
R = TypeVar("R")


class Ranks:
    """The processes of a run: sums over them, shares of each, and waiting together.

    Args:
        accelerator: accelerate's, of this process.

    Attributes:
        waiting: whether this process waits for the teacher now.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.waiting = False

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self._accelerator.process_index

    @property
    def count(self) -> int:
        """The number of processes."""
        return self._accelerator.num_processes

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the values of all processes; the sum is on the CPU."""
        summed: torch.Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "sum")
        return summed.cpu()

    def any(self, value: bool) -> bool:
        """Return whether it is true on any process."""
        return bool(self.sum(torch.tensor(float(value))))

    def share(self, items: Sequence[T]) -> tuple[list[T], int]:
        """Return every n-th item for this process, and how many of them are real.

        A process with too few gets the first item again, because all that share weights must call
        the model equally often.
        """
        mine = list(items[self.rank :: self.count])
        missing = -(-len(items) // self.count) - len(mine)
        return mine + list(items[:1]) * missing, len(mine)

    def together(self, wait: Callable[[], R], *, meets: bool = True) -> R:
        """Return the result of ``wait``; if it fails on one process, it fails on all.

        So no process is left waiting for another's gradients, and all can save a checkpoint.

        Args:
            meets: True if a collective follows. If False, only a process that fails waits here,
                until the others reach a call with True.

        Raises:
            TeacherError, ProtocolError, RolloutServerError: as ``wait``.
            TeacherUnreachableError: of a process whose own servers answered.
        """
        error: Exception | None = None
        try:
            self.waiting = True
            brought = wait()
        except (TeacherError, ProtocolError, RolloutServerError) as failure:
            error = failure
        finally:
            self.waiting = False
        if self.count > 1 and (meets or error is not None):
            failed = self.any(error is not None)
            if failed and error is None:
                error = TeacherUnreachableError(
                    "another process of this run lost its teacher or rollout server, and says how"
                )
        if error is not None:
            raise error
        return brought

    def wait_no_longer(self) -> None:
        """End a wait for the teacher, if there is one: for a signal's handler.

        Raises:
            TeacherUnreachableError: this process waited.
        """
        if self.waiting:
            raise TeacherUnreachableError("told to end while it waited for the teacher")


def from_first_rank(value: T) -> T:
    """Return the first process's value on all; without a group of processes, the value."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def from_all_ranks(value: T) -> list[T]:
    """Return the values of all processes; without a group of processes, the value alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held
