"""Equal questions at the same time: computed once, answered to each who asked."""

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


class InFlight:
    """Work under way, by what was asked.

    A request that is sent again, because its connection was cut or a gateway lost patience, finds
    the first one still in the model, and shares its answer instead of being computed beside it.

    Args:
        on_shared: is called for each that does.
    """

    def __init__(self, on_shared: Callable[[], None]) -> None:
        self._on_shared = on_shared
        self._work: dict[bytes, _Work] = {}

    async def ask(self, key: bytes, work: Callable[[], Coroutine[Any, Any, A]]) -> A:
        """The result of ``work``, begun now or by an earlier caller with the same ``key``.

        It is cancelled once everybody who asked is gone. Its exception is raised to each of them.
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
            # Whoever comes now asks anew: what is over is not kept, and what is cancelled is lost.
            if (shared.callers == 0 or shared.task.done()) and self._work.get(key) is shared:
                del self._work[key]
