"""Who gets in: readiness, back-pressure, deadlines, and callers who left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from shared.errors import DeadlineExceededError, OverloadedError, UnavailableError
from teacher_server.metrics import Metrics

R = TypeVar("R")

RETRY_AFTER = 1.0


class ClientGoneError(Exception):
    """The caller closed the connection; nobody waits for the answer."""


class Admission:
    """Bounds the tokens in the house; over the bound a request is refused, never queued.

    Args:
        max_queued_tokens: admitted and not yet answered, over all requests.
        request_timeout: seconds a request may take.
        metrics: shows the queue.
    """

    def __init__(self, max_queued_tokens: int, request_timeout: float, metrics: Metrics) -> None:
        self.max_queued_tokens = max_queued_tokens
        self.request_timeout = request_timeout
        self.draining = False
        self._queued = 0
        self._metrics = metrics

    @contextlib.contextmanager
    def admit(self, tokens: int, jobs: int) -> Iterator[None]:
        """Hold a place for ``jobs`` that bring ``tokens``.

        Raises:
            UnavailableError: the server is draining.
            OverloadedError: the queue has no room.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down", retry_after=RETRY_AFTER)
        if self._queued + tokens > self.max_queued_tokens:
            raise OverloadedError(
                f"{self._queued} tokens are queued and the request brings {tokens}; the limit is "
                f"{self.max_queued_tokens}. Try again later",
                retry_after=RETRY_AFTER,
            )
        self._add(tokens, jobs)
        try:
            yield
        finally:
            self._add(-tokens, -jobs)

    def _add(self, tokens: int, jobs: int) -> None:
        self._queued += tokens
        self._metrics.queued_tokens.inc(tokens)
        self._metrics.queued_jobs.inc(jobs)

    async def run(
        self, work: Coroutine[Any, Any, R], disconnected: Callable[[], Awaitable[None]]
    ) -> R:
        """The result of ``work``, which is cancelled at the deadline or when the caller leaves.

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
