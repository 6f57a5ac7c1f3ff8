"""The watch over rollout servers that write, which finds one that hangs with open connections."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator

import httpx

_LOOK_SECONDS = 10.0
# What vLLM counts in each step of its engine. Without --disable-log-stats it tells them.
_COUNTERS = ("vllm:generation_tokens_total", "vllm:iteration_tokens_total_count")


class StalledServerError(Exception):
    """A server that has written no token for too long."""


class StallWatch:
    """A bound on the time in which a server writes nothing at all.

    A request may take as long as its completion is. So what is bounded is the time since any
    request to the server ended, or since its counter of tokens (``/metrics``) moved. A server that
    does not count need only answer.

    Args:
        client: sends the looks.
        seconds: longest time without a token.
    """

    def __init__(self, client: httpx.AsyncClient, seconds: float) -> None:
        self._client, self._seconds = client, seconds
        self._running: dict[str, set[asyncio.Timeout]] = defaultdict(set)
        self._moved: dict[str, float] = {}  # when a server was last seen to write
        self._counted: dict[str, list[str]] = {}

    @contextlib.asynccontextmanager
    async def over(self, url: str) -> AsyncIterator[None]:
        """Hold a request to a server in the block.

        Raises:
            StalledServerError: the server writes nothing any more.
        """
        running = self._running[url]
        if not running:
            self._moved[url] = time.monotonic()
        try:
            async with asyncio.timeout(None) as limit:
                running.add(limit)
                try:
                    yield
                finally:
                    running.discard(limit)
        except TimeoutError:
            raise StalledServerError(f"it wrote no token for {self._seconds:g} s") from None
        self._moved[url] = time.monotonic()

    async def run(self) -> None:
        """Look at the servers again and again, until cancelled."""
        every = min(_LOOK_SECONDS, self._seconds / 4)
        while True:
            await asyncio.sleep(every)
            now = time.monotonic()
            quiet = [
                url
                for url, held in self._running.items()
                if held and now > self._moved[url] + every
            ]
            await asyncio.gather(*(self._look(url, every) for url in quiet))

    async def _look(self, url: str, seconds: float) -> None:
        try:
            answer = await self._client.get(f"{url}/metrics", timeout=seconds)
        except httpx.HTTPError:
            moved = False
        else:
            counted = [line for line in answer.text.splitlines() if line.startswith(_COUNTERS)]
            moved = not counted or counted != self._counted.get(url)
            self._counted[url] = counted
        now = time.monotonic()
        if moved:
            self._moved[url] = now
        elif now > self._moved[url] + self._seconds:
            for limit in list(self._running[url]):
                limit.reschedule(asyncio.get_running_loop().time())
