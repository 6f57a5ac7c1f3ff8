"""Admit requests or refuse them: 429 over a quota, 503 while draining, 504 at the deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from prometheus_client import Gauge

from shared.errors import DeadlineExceededError, OverloadedError, UnavailableError
from teacher_server.metrics import Metrics

R = TypeVar("R")

RETRY_AFTER = 1.0
# The most queued jobs: each costs a few kilobytes and a moment of the event loop.
MAX_QUEUED_JOBS = 1 << 14


class ClientGoneError(Exception):
    """A caller that closed the connection, so nobody waits for the answer."""


class Quota:
    """A quota of one resource, which all requests share.

    A client that holds some already may never hold more than it leaves free: one client gets at
    most half, two get a third each, so another always finds some. A request over the quota is
    refused, never queued.

    Source: Choudhury and Hahne, Dynamic Queue Length Thresholds for Shared-Memory Packet Switches,
    IEEE/ACM Transactions on Networking 6(2), 1998.

    Args:
        limit: of all clients together.
        thing: name of the resource in messages.
        gauge: shows what is held.
    """

    def __init__(self, limit: int, thing: str, gauge: Gauge) -> None:
        self.limit = limit
        self._thing = thing
        self._gauge = gauge
        self._held: Counter[str] = Counter()
        self._total = 0

    def take(self, client: str, amount: int, *, already: int = 0) -> None:
        """Take ``amount`` more for a request that holds ``already`` of it, or refuse it (429).

        Raises:
            OverloadedError: the quota does not allow it.
        """
        total, own = self._total, self._held[client] - already
        if total + amount > self.limit:
            raise OverloadedError(
                f"{total} {self._thing} are queued and the request brings {amount}; the limit is "
                f"{self.limit}. Try again later",
                retry_after=RETRY_AFTER,
            )
        free = self.limit - total + already
        if own and own + already + amount > free:
            raise OverloadedError(
                f"{own} {self._thing} of this client are queued and the request brings "
                f"{already + amount}; a client holds no more than it leaves free, now {free} of "
                f"{self.limit}. Try again later",
                retry_after=RETRY_AFTER,
            )
        self._add(client, amount)

    def give(self, client: str, amount: int) -> None:
        self._add(client, -amount)

    def _add(self, client: str, amount: int) -> None:
        self._held[client] += amount
        self._total += amount
        if not self._held[client]:
            del self._held[client]
        self._gauge.inc(amount)


class HeldBytes:
    """The bytes that one request holds: its body, then its answer until it is sent."""

    def __init__(self, quota: Quota, client: str) -> None:
        self._quota = quota
        self._client = client
        self.bytes = 0

    def add(self, size: int) -> None:
        """Take ``size`` more bytes.

        Raises:
            OverloadedError: the quota does not allow it.
        """
        self._quota.take(self._client, size, already=self.bytes)
        self.bytes += size

    def free(self) -> None:
        self._quota.give(self._client, self.bytes)
        self.bytes = 0


class Admission:
    """A bound on the admitted requests: their tokens, sequences and bytes.

    Args:
        max_queued_tokens: admitted and not yet answered, over all requests.
        max_held_bytes: of bodies and answers, over all requests.
        request_timeout: seconds a request may take.
        metrics: shows the queue.
    """

    def __init__(
        self, max_queued_tokens: int, max_held_bytes: int, request_timeout: float, metrics: Metrics
    ) -> None:
        self.request_timeout = request_timeout
        self.draining = False
        self.tokens = Quota(max_queued_tokens, "tokens", metrics.queued_tokens)
        self.bytes = Quota(max_held_bytes, "bytes", metrics.held_bytes)
        self.jobs = Quota(MAX_QUEUED_JOBS, "sequences", metrics.queued_jobs)
        metrics.max_queued_tokens.set(max_queued_tokens)
        metrics.max_held_bytes.set(max_held_bytes)
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests = 0

    @contextlib.contextmanager
    def admit(self, client: str, tokens: int, jobs: int) -> Iterator[None]:
        """Admit a request of ``client`` with its ``tokens`` and ``jobs`` until the block ends.

        Raises:
            UnavailableError: the server is draining.
            OverloadedError: a quota does not allow it.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down", retry_after=RETRY_AFTER)
        self.tokens.take(client, tokens)
        try:
            self.jobs.take(client, jobs)
        except OverloadedError:
            self.tokens.give(client, tokens)
            raise
        self._requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.tokens.give(client, tokens)
            self.jobs.give(client, jobs)
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def drain(self) -> None:
        """Admit nothing from now on, and wait until what was admitted is answered."""
        self.draining = True
        await self._idle.wait()

    async def run(
        self, work: Coroutine[Any, Any, R], disconnected: Callable[[], Awaitable[None]]
    ) -> R:
        """Return the result of ``work``; cancel it at the deadline or when the caller leaves.

        Raises:
            DeadlineExceededError: after ``request_timeout`` seconds.
            ClientGoneError: ``disconnected`` returned first.
        """
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(disconnected())
        try:
            done, _ = await asyncio.wait(
                {task, watch}, timeout=self.request_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                return task.result()
            if watch in done:
                raise ClientGoneError
            raise DeadlineExceededError(
                f"not answered within {self.request_timeout:g} s; send fewer tokens at once"
            )
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
