"""The loaded model as the routes use it: jobs in, results out, tokens counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.errors import InternalError, PayloadTooLargeError
from shared.protocol import Completion, InfoResponse
from shared.sparse import SparseLogprobs
from teacher_server.backends.base import Backend, GenerateJob, ScoreJob
from teacher_server.jobs import Keyed
from teacher_server.limits.single_flight import SingleFlight
from teacher_server.metrics import Metrics
from teacher_server.openai.adapter import OpenAIAdapter

R = TypeVar("R")
Q = TypeVar("Q")

# After so many jobs of one request the event loop turns to others before it starts more of them.
_STARTED_AT_ONCE = 32


@dataclass(frozen=True)
class Service:
    """The part of the application that its routes work with.

    Attributes:
        loaded: returns the backend and the answer of `/v1/info`; raises `UnavailableError` while
            the model loads, while the server drains, and when the engine has died.
        check_alive: raises `UnavailableError` when the engine has died.
        in_flight: jobs under way, by key.
        metrics: counts tokens.
        openai: OpenAI's requests and answers for the served model.
    """

    loaded: Callable[[], tuple[Backend, InfoResponse]]
    check_alive: Callable[[], None]
    in_flight: SingleFlight
    metrics: Metrics
    openai: OpenAIAdapter

    async def score(
        self, backend: Backend, jobs: Sequence[Keyed[ScoreJob]], field: str
    ) -> list[SparseLogprobs]:
        """Return the scores of the jobs, in order; ``field`` is where the request lists them.

        A job that is under way already, for the same client, is not computed again.
        """
        return await in_order([self._score_one(backend, one) for one in jobs], field)

    async def generate(
        self, backend: Backend, jobs: Sequence[Keyed[GenerateJob]], field: str, n: int
    ) -> list[Completion]:
        """Return the completions of the jobs, in order: n for each item of ``field``."""
        return await in_order([self.generate_one(backend, one) for one in jobs], field, n)

    async def _score_one(self, backend: Backend, one: Keyed[ScoreJob]) -> SparseLogprobs:
        # Another client's equal job is not shared: it may wait for that client's turn.
        return await self.in_flight.run(one.key, lambda: backend.score(one.job))

    async def generate_one(self, backend: Backend, one: Keyed[GenerateJob]) -> Completion:
        """Return a completion, that of an equal job under way if there is one.

        A job without a seed has a key of its own, unless it is greedy.
        """
        return await self.in_flight.run(one.key, lambda: backend.generate(one.job))

    def count_scored(self, jobs: Sequence[Keyed[ScoreJob]]) -> None:
        """Count the tokens of jobs that are done."""
        rows = sum(one.job.rows for one in jobs)
        self.metrics.tokens.labels("scored").inc(rows)
        self.metrics.tokens.labels("prompt").inc(sum(one.job.tokens for one in jobs) - rows)

    def count_generated(
        self, jobs: Sequence[Keyed[GenerateJob]], completions: Sequence[Completion]
    ) -> None:
        """Count the tokens of jobs that are done, and of what they wrote."""
        generated = sum(len(completion.token_ids) for completion in completions)
        self.metrics.tokens.labels("generated").inc(generated)
        self.metrics.tokens.labels("prompt").inc(sum(len(one.job.prompt) for one in jobs))


async def in_order(
    work: Sequence[Coroutine[Any, Any, R]], field: str, jobs_each: int = 1
) -> list[R]:
    """Return the results in order; the first failure cancels the rest.

    Args:
        work: a coroutine for each job.
        field: where the request lists the items that the jobs are made from.
        jobs_each: jobs of each item.

    Raises:
        InternalError, PayloadTooLargeError: one job failed so; ``field`` names its item.
    """

    async def one(index: int, item: Coroutine[Any, Any, R]) -> R:
        try:
            return await item
        except (InternalError, PayloadTooLargeError) as error:
            # A new error, because other requests may share the one that was caught.
            raise type(error)(error.detail, field=f"{field}.{index // jobs_each}") from error

    tasks: list[asyncio.Future[R]] = []
    try:
        for index, item in enumerate(work):
            tasks.append(asyncio.ensure_future(one(index, item)))
            if len(tasks) % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        for item in work[len(tasks) :]:
            item.close()


async def both(first: Coroutine[Any, Any, R], second: Coroutine[Any, Any, Q]) -> tuple[R, Q]:
    """Return both results; the first failure cancels the other."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
