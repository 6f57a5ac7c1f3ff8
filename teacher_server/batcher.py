"""Many requests -> token-budgeted model batches -> many answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shared.errors import UnavailableError

logger = logging.getLogger(__name__)


class Sized(Protocol):
    @property
    def tokens(self) -> int: ...


J = TypeVar("J", bound=Sized)
A = TypeVar("A")


@dataclass(frozen=True)
class _Waiting(Generic[J, A]):
    job: J
    answer: asyncio.Future[A]


class Batcher(Generic[J, A]):
    """Joins jobs of all clients into batches for one model.

    A batch takes the job that waited longest, then others in order of arrival whose length makes
    the padded batch (longest × count) fit ``max_batch_tokens``; what does not fit waits, and is the
    oldest soon. A batch that fails is tried again in halves, so one bad job fails alone and a
    batch too large for the memory is split. Jobs whose caller went away are dropped unrun.

    Args:
        run: computes the answers of a batch, in order; called in ``executor``.
        executor: the thread that owns the model, shared by all batchers of one model.
        max_batch_tokens: padded tokens of a batch; a longer single job still runs, alone.
        observe: is told (jobs, padded tokens) of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[J]], list[A]],
        executor: Executor,
        *,
        max_batch_tokens: int,
        observe: Callable[[int, int], None] | None = None,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_batch_tokens = max_batch_tokens
        self._observe = observe
        self._waiting: list[_Waiting[J, A]] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, job: J) -> A:
        """The answer of one job, or the exception it failed with."""
        if self._task is None:
            self._task = asyncio.create_task(self._serve())
        waiting: _Waiting[J, A] = _Waiting(job, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def close(self) -> None:
        """Stop; jobs still waiting fail with `UnavailableError`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._waiting:
            if not waiting.answer.done():
                waiting.answer.set_exception(UnavailableError("the server is shutting down"))
        self._waiting.clear()

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(0)  # let requests that arrived together join the batch
            batch = self._take()
            if not self._waiting:
                self._arrived.clear()
            if batch:
                await self._answer(batch)

    def _take(self) -> list[_Waiting[J, A]]:
        """The next batch, by the rule above; removes it from the queue."""
        batch: list[_Waiting[J, A]] = []
        left: list[_Waiting[J, A]] = []
        longest = 0
        for waiting in self._waiting:
            if waiting.answer.done():  # cancelled
                continue
            padded = max(longest, waiting.job.tokens) * (len(batch) + 1)
            if batch and padded > self._max_batch_tokens:
                left.append(waiting)
                continue
            longest = max(longest, waiting.job.tokens)
            batch.append(waiting)
        self._waiting = left
        if batch and self._observe is not None:
            self._observe(len(batch), longest * len(batch))
        return batch

    async def _answer(self, batch: list[_Waiting[J, A]]) -> None:
        loop = asyncio.get_running_loop()
        jobs = [waiting.job for waiting in batch]
        try:
            answers = await loop.run_in_executor(self._executor, self._run, jobs)
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            logger.warning("A batch of %d failed (%s); trying its halves", len(batch), error)
            middle = len(batch) // 2
            await self._answer(batch[:middle])
            await self._answer(batch[middle:])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
