"""Compute equal requests that overlap in time once, and answer all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

A = TypeVar("A")


@dataclass
class _Work:
    task: asyncio.Task[Any]
    callers: int = 0


class SingleFlight:
    """The work that is running, by key, so that equal requests share it.

    A request that is sent again, because its connection was cut or a gateway timed out, shares the
    answer of the first one if that still runs.

    Args:
        on_shared: is called for each request that does.
    """

    def __init__(self, on_shared: Callable[[], None]) -> None:
        self._on_shared = on_shared
        self._work: dict[bytes, _Work] = {}

    async def run(self, key: bytes, work: Callable[[], Coroutine[Any, Any, A]]) -> A:
        """Return the result of ``work``, begun now or by an earlier caller with the same ``key``.

        The work is cancelled once all its callers are gone. Its exception is raised to each of
        them.
        """
        shared = self._work.get(key)
        if shared is None:
            shared = self._work[key] = _Work(asyncio.ensure_future(work()))
        else:
            self._on_shared()
        shared.callers += 1
        try:
            result: A = await asyncio.shield(shared.task)
            return result
        finally:
            shared.callers -= 1
            if shared.callers == 0:
                shared.task.cancel()
            # A later caller starts anew, because finished results are not kept and cancelled ones
            # are lost.
            if (shared.callers == 0 or shared.task.done()) and self._work.get(key) is shared:
                del self._work[key]
