"""Run work on bodies and texts in threads that clients share evenly."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from teacher_server.limits.fairness import FairQueue

R = TypeVar("R")

# The least bytes that work counts, because small bodies have costs too.
_LEAST_COST = 4096


@dataclass(eq=False)
class _Turn:
    client: str
    cost: int
    start: int  # in the order of `FairQueue`
    function: Callable[[], Any]
    result: asyncio.Future[Any]


class FairPool:
    """A pool of threads in which clients take turns by what their work costs.

    One client keeps at most half of the threads busy, so that another finds one soon. A caller who
    leaves gives up its turn; what has begun runs to its end and keeps its thread until then.

    Args:
        threads: at least 2.
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "request")
        self._free = threads
        self._most = max(1, threads // 2)
        self._busy: Counter[str] = Counter()
        self._fair_queue = FairQueue(_LEAST_COST)
        self._waiting: list[_Turn] = []

    async def run(self, client: str, cost: int, function: Callable[..., R], *arguments: Any) -> R:
        """Return ``function(*arguments)``, computed in a thread when it is the client's turn.

        Args:
            cost: bytes that the function works on.
        """
        context = contextvars.copy_context()
        turn = _Turn(
            client, cost, self._fair_queue.start(client, cost),
            lambda: context.run(function, *arguments),
            asyncio.get_running_loop().create_future(),
        )  # fmt: skip
        self._waiting.append(turn)
        self._begin()
        try:
            result: R = await turn.result
            return result
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
                self._fair_queue.dropped(client, cost)
            raise

    def _begin(self) -> None:
        """Start waiting functions for which there is a free thread."""
        while self._free:
            able = [turn for turn in self._waiting if self._busy[turn.client] < self._most]
            if not able:
                return
            turn = min(able, key=lambda turn: turn.start)
            self._waiting.remove(turn)
            self._fair_queue.begun(turn.start)
            self._free -= 1
            self._busy[turn.client] += 1
            loop = turn.result.get_loop()
            work = loop.run_in_executor(self._executor, turn.function)
            work.add_done_callback(functools.partial(self._ended, turn))

    def _ended(self, turn: _Turn, work: asyncio.Future[Any]) -> None:
        self._free += 1
        self._busy[turn.client] -= 1
        if not self._busy[turn.client]:
            del self._busy[turn.client]
        error = work.exception()
        if not turn.result.done():
            if error is None:
                turn.result.set_result(work.result())
            else:
                turn.result.set_exception(error)
        self._begin()
