"""Join the jobs of many requests into token-budgeted batches of the model."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from shared.errors import UnavailableError
from teacher_server.limits.fairness import LEAST_JOB_TOKENS, FairQueue

logger = logging.getLogger(__name__)

# The most jobs of a batch, however short, because each has costs beside its tokens.
MAX_BATCH_JOBS = 256
# Jobs that a batch is chosen from, the next ones in turn, so that choosing stays fast however many
# wait.
_CHOICE = 4 * MAX_BATCH_JOBS


def within_padding(lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    """Return groups of sequences, by index, each padded by at most ``pass_tokens`` in all.

    Args:
        lengths: tokens of each sequence; a group is padded to its longest.
        pass_tokens: the tokens in whose time a forward pass begins and ends, so that more padding
            takes longer than one more pass.
    """
    groups: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padding += longest - lengths[index]
        if not groups or padding > pass_tokens:
            groups.append([])
            longest, padding = lengths[index], 0
        groups[-1].append(index)
    return groups


class Job(Protocol):
    """A job as the batcher sees it: its tokens, and the client that sent it."""

    @property
    def tokens(self) -> int: ...

    @property
    def client(self) -> str: ...


J = TypeVar("J", bound=Job)
A = TypeVar("A")


@dataclass(eq=False)
class _Waiting(Generic[J, A]):
    job: J
    start: int  # in the order of `FairQueue`
    place: int  # in order of arrival
    answer: asyncio.Future[A]
    since: float = field(default_factory=time.perf_counter)
    queued: bool = True

    def __lt__(self, other: _Waiting[J, A]) -> bool:
        return (self.start, self.place) < (other.start, other.place)

    def settle(self, answer: A) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


class Callers(Generic[A]):
    """The callers of a running batch, as the thread that runs it sees them."""

    def __init__(self, batch: Sequence[_Waiting[Any, A]], loop: asyncio.AbstractEventLoop) -> None:
        self._batch = batch
        self._loop = loop

    def waiting(self) -> list[bool]:
        """Return for each job whether somebody still waits for its answer."""
        return [not waiting.answer.done() for waiting in self._batch]

    def answer(self, index: int, answer: A) -> None:
        """Answer one job now, before the rest of its batch."""
        self._loop.call_soon_threadsafe(self._batch[index].settle, answer)


class Batcher(Generic[J, A]):
    """A queue that joins jobs of all clients into batches for one model.

    Clients take turns by `FairQueue`. A batch takes the job whose turn it is, then those nearest to
    it in length, first of the same client, as long as the padded batch (longest × count) fits
    ``max_batch_tokens``, up to `MAX_BATCH_JOBS`, and its padding ``max_padding``. What does not fit
    waits for its turn; the job of a client that waited longest is always its first. A batch that
    fails is tried again in halves, without the jobs that have an answer, so one bad job fails alone
    and a batch too large for the memory is split. Jobs whose caller went away are dropped.

    Args:
        run: answers each job of a batch that somebody waits for, as soon as it can; called in
            ``executor``. It may ask who still waits, and end early when nobody does.
        executor: the thread that owns the model, shared by all batchers of one model.
        max_batch_tokens: padded tokens of a batch; a longer single job still runs, alone.
        max_padding: of these, tokens of padding; None for any. As many tokens as one more batch
            costs beside its own: then neither padding nor batches are wasted.
        observe: is called with (seconds that each job has waited, padded tokens) of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[J], Callers[A]], None],
        executor: Executor,
        *,
        max_batch_tokens: int,
        max_padding: int | None = None,
        observe: Callable[[Sequence[float], int], None] | None = None,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_batch_tokens = max_batch_tokens
        self._max_padding = math.inf if max_padding is None else max_padding
        self._observe = observe
        self._fair_queue = FairQueue(LEAST_JOB_TOKENS)
        self._places = itertools.count()
        self._waiting: list[_Waiting[J, A]] = []  # a heap
        self._gone = 0  # number of them that nobody waits for
        self._running: list[_Waiting[J, A]] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, job: J) -> A:
        """Queue a job, and return its answer or raise the exception it failed with."""
        if self._task is None:
            # An empty context, because the task serves all requests and not only the first one.
            self._task = asyncio.create_task(self._serve(), context=contextvars.Context())
        start = self._fair_queue.start(job.client, job.tokens)
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        waiting: _Waiting[J, A] = _Waiting(job, start, next(self._places), answer)
        heapq.heappush(self._waiting, waiting)
        self._arrived.set()
        try:
            return await answer
        except asyncio.CancelledError:
            self._leave(waiting)
            raise

    def _leave(self, waiting: _Waiting[J, A]) -> None:
        """Give up the turn of a job that nobody waits for, unless it runs already."""
        if not waiting.queued:
            return
        self._fair_queue.dropped(waiting.job.client, waiting.job.tokens)
        self._gone += 1
        if self._gone > max(_CHOICE, len(self._waiting) // 2):
            self._waiting = [one for one in self._waiting if not one.answer.done()]
            heapq.heapify(self._waiting)
            self._gone = 0

    async def close(self) -> None:
        """Stop; jobs still waiting or running fail with `UnavailableError`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._running + self._waiting:
            if not waiting.answer.done():
                waiting.answer.set_exception(UnavailableError("the server is shutting down"))
        self._waiting.clear()

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(0)  # let requests that arrived together join the batch
            self._running = self._take()
            if not self._waiting:
                self._arrived.clear()
            if self._running:
                await self._answer(self._running)
                self._running = []  # frees the answers, which may be large, before the next batch

    def _take(self) -> list[_Waiting[J, A]]:
        """Remove the next batch from the queue, and return it."""
        choice: list[_Waiting[J, A]] = []
        while self._waiting and len(choice) < _CHOICE:
            waiting = heapq.heappop(self._waiting)
            if waiting.answer.done():
                self._gone -= 1
            else:
                choice.append(waiting)
        if not choice:
            return []
        first = choice[0]
        self._fair_queue.begun(first.start)
        longest = tokens = 0
        batch: list[_Waiting[J, A]] = []

        def rank(waiting: _Waiting[J, A]) -> tuple[bool, bool, int]:
            other = waiting.job.client != first.job.client
            return waiting is not first, other, abs(waiting.job.tokens - first.job.tokens)

        for waiting in sorted(choice, key=rank):
            wider = max(longest, waiting.job.tokens)
            padded = wider * (len(batch) + 1)
            padding = padded - tokens - waiting.job.tokens
            full = padded > self._max_batch_tokens or padding > self._max_padding
            if batch and (full or len(batch) == MAX_BATCH_JOBS):
                heapq.heappush(self._waiting, waiting)
                continue
            longest = wider
            tokens += waiting.job.tokens
            waiting.queued = False
            batch.append(waiting)
        if self._observe is not None:
            now = time.perf_counter()
            self._observe([now - waiting.since for waiting in batch], longest * len(batch))
        return batch

    async def _answer(self, batch: list[_Waiting[J, A]]) -> None:
        if await self._try(batch):
            return
        # Done outside the except block, so that the exception's frames no longer hold tensors.
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            await self._answer([waiting for waiting in half if not waiting.answer.done()])

    async def _try(self, batch: list[_Waiting[J, A]]) -> bool:
        """Run a batch; return False if it has several jobs and failed."""
        if not batch:
            return True
        jobs = [waiting.job for waiting in batch]
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._run, jobs, Callers(batch, loop))
        except Exception as error:
            if len(batch) > 1:
                # As text, because a log record would keep the exception and the tensors of its
                # frames.
                logger.warning(
                    "A batch of %d failed (%r); trying its halves", len(batch), str(error)
                )
                return False
            if not batch[0].answer.done():
                batch[0].answer.set_exception(error)
        return True
