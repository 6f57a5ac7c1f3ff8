"""Jobs of many callers become batches: whole, bounded, fair, and each failure alone."""

import asyncio
import gc
import itertools
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UnavailableError
from teacher_server.batcher import MAX_BATCH_JOBS, Batcher, within_padding


@dataclass(frozen=True)
class Job:
    number: int
    tokens: int
    client: str = ""


class Model:
    """Answers ten times a job's number and remembers its batches; ``gate`` holds it back."""

    def __init__(self, fails=lambda jobs: False):
        self.batches = []
        self.fails = fails
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def run(self, jobs, callers):
        self.entered.set()
        self.gate.wait(10)
        self.batches.append([job.number for job in jobs])
        if self.fails(jobs):
            raise MemoryError(f"no room for {len(jobs)}")
        for index, job in enumerate(jobs):
            callers.answer(index, job.number * 10)


def serve(work, model, budget=100, **options):
    """Run ``work(batcher)`` with a batcher on one thread."""

    async def scenario():
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(model.run, thread, max_batch_tokens=budget, **options)
            try:
                return await work(batcher)
            finally:
                model.gate.set()
                await batcher.close()

    return asyncio.run(scenario())


async def entered(model):
    while not model.entered.is_set():
        await asyncio.sleep(0.001)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 130), min_size=1, max_size=30))
def test_every_job_is_answered_once_and_no_batch_exceeds_the_budget(lengths):
    model, seen = Model(), []

    async def work(batcher):
        jobs = [Job(number, tokens) for number, tokens in enumerate(lengths)]
        return await asyncio.gather(*map(batcher.submit, jobs))

    answers = serve(work, model, observe=lambda waited, tokens: seen.append((waited, tokens)))
    assert answers == [number * 10 for number in range(len(lengths))]
    assert sorted(n for batch in model.batches for n in batch) == list(range(len(lengths)))
    for batch, (waited, tokens) in zip(model.batches, seen, strict=True):
        padded = max(lengths[n] for n in batch) * len(batch)
        assert (len(waited), tokens) == (len(batch), padded)
        assert min(waited) >= 0
        assert padded <= 100 or len(batch) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 130), min_size=1, max_size=30))
def test_every_batch_takes_the_job_that_waited_longest(lengths):
    model = Model()

    async def work(batcher):
        await asyncio.gather(*(batcher.submit(Job(n, t)) for n, t in enumerate(lengths)))

    serve(work, model)
    left = list(range(len(lengths)))
    for batch in model.batches:
        assert batch[0] == left[0]
        left = [number for number in left if number not in batch]


def test_a_flood_does_not_starve_another_client():
    """Both get every other batch while both wait, however late the second one comes."""
    model = Model()
    model.gate.clear()

    async def work(batcher):
        flood = [asyncio.create_task(batcher.submit(Job(n, 24, "flood"))) for n in range(1000)]
        await entered(model)
        few = [  # of lengths that are nearer to the other client's than to one another
            asyncio.create_task(batcher.submit(Job(1000 + n, 25 - 2 * n, "few"))) for n in range(12)
        ]
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(*few, *flood)

    serve(work, model)
    last = max(i for i, batch in enumerate(model.batches) if max(batch) >= 1000)
    # Before it the batch that ran, two or three of its own, and one of the other client's.
    assert last <= 4


def test_many_tiny_jobs_of_a_client_delay_another_by_one_batch():
    """Batches end at a number of jobs, whatever the tokens, and a tiny job is not free."""
    model = Model()
    model.gate.clear()

    async def work(batcher):
        batcher._max_batch_tokens = 1 << 20
        flood = [asyncio.create_task(batcher.submit(Job(n, 1, "flood"))) for n in range(5000)]
        await entered(model)
        other = asyncio.create_task(batcher.submit(Job(5000, 100, "other")))
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(other, *flood)

    serve(work, model)
    assert max(map(len, model.batches)) == MAX_BATCH_JOBS
    assert [5000 in batch for batch in model.batches].index(True) <= 1


def test_choosing_a_batch_takes_no_longer_the_more_jobs_wait():
    async def seconds(jobs):
        batcher = Batcher(lambda jobs, callers: None, None, max_batch_tokens=1 << 20)
        batcher._serve = asyncio.Event().wait
        tasks = [asyncio.create_task(batcher.submit(Job(n, 2, "a"))) for n in range(jobs)]
        await asyncio.sleep(0)
        since = time.process_time()
        for _ in range(10):
            batcher._take()
        taken = time.process_time() - since
        for task in tasks:
            task.cancel()
        return taken

    few, many = (min(asyncio.run(seconds(jobs)) for _ in range(2)) for jobs in (2000, 16_000))
    assert many < 4 * few


def test_a_client_is_not_made_to_wait_for_what_it_has_dropped():
    model = Model()
    model.gate.clear()

    async def work(batcher):
        running = asyncio.create_task(batcher.submit(Job(0, 100, "other")))
        await entered(model)
        dropped = [asyncio.create_task(batcher.submit(Job(n, 100, "a"))) for n in range(1, 50)]
        await asyncio.sleep(0.01)
        for task in dropped:
            task.cancel()
        model.gate.set()
        await running
        model.gate.clear()
        model.entered.clear()
        blocker = asyncio.create_task(batcher.submit(Job(50, 100, "other")))
        await entered(model)
        rest = [batcher.submit(Job(n, 100, "other")) for n in range(51, 55)]
        waits = asyncio.gather(*rest, batcher.submit(Job(99, 100, "a")))
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(blocker, waits)

    serve(work, model)
    assert [99] in model.batches[:4]


def test_jobs_of_similar_length_share_a_batch():
    model = Model()

    async def work(batcher):
        lengths = [10, 50, 11, 50, 9, 10]
        await asyncio.gather(*(batcher.submit(Job(n, t)) for n, t in enumerate(lengths)))

    serve(work, model)
    assert [sorted(batch) for batch in model.batches] == [[0, 2, 4, 5], [1, 3]]


def padded_tokens(lengths, **options):
    """The batches of jobs that arrive together, by length, and their padded tokens in all."""
    model, seen = Model(), []

    async def work(batcher):
        await asyncio.gather(*(batcher.submit(Job(n, t)) for n, t in enumerate(lengths)))

    serve(work, model, 16_384, observe=lambda _, tokens: seen.append(tokens), **options)
    return [[lengths[n] for n in batch] for batch in model.batches], sum(seen)


def test_short_sequences_are_not_padded_to_a_long_one():
    lengths = [100, 100, 901, 100, 100, 100, 100]
    assert padded_tokens(lengths) == ([[100] * 6 + [901]], 6307)  # 4.2 times the tokens
    assert padded_tokens(lengths, max_padding=64) == ([[100] * 6, [901]], 1501)


def test_batches_of_mixed_lengths_cost_little_more_than_their_tokens():
    """Lengths as of chats; a batch is counted as 64 tokens beside its own."""
    rng = random.Random(0)
    lengths = [min(2000, round(rng.lognormvariate(5.7, 0.8))) for _ in range(64)]
    cost = {}
    for padding in (None, 64):
        batches, tokens = padded_tokens(lengths, max_padding=padding)
        cost[padding] = (tokens + 64 * len(batches)) / sum(lengths)
    assert cost[None] > 1.5
    assert cost[64] < 1.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 130), min_size=1, max_size=30), st.integers(0, 100))
def test_a_batch_has_no_more_padding_than_it_may_and_is_one_forward_pass(lengths, padding):
    batches, _ = padded_tokens(lengths, max_padding=padding)
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    for batch in batches:
        assert max(batch) * len(batch) - sum(batch) <= padding
        assert len(within_padding(batch, padding)) == 1
    groups = within_padding(lengths, padding)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        some = [lengths[index] for index in group]
        assert max(some) * len(some) - sum(some) <= padding


def test_a_long_sequence_among_a_flood_of_short_ones_has_its_turn():
    """A client's one long job is first of a batch when it is its turn, whatever the padding."""
    model = Model()
    model.gate.clear()

    async def work(batcher):
        flood = [asyncio.create_task(batcher.submit(Job(n, 20, "flood"))) for n in range(200)]
        await entered(model)
        long = asyncio.create_task(batcher.submit(Job(1000, 90, "long")))
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(long, *flood)

    serve(work, model, max_padding=0)
    assert [1000 in batch for batch in model.batches].index(True) <= 2


def test_what_arrives_while_the_model_runs_is_joined():
    model = Model()
    model.gate.clear()

    async def work(batcher):
        first = asyncio.create_task(batcher.submit(Job(0, 1)))
        await entered(model)
        rest = [asyncio.create_task(batcher.submit(Job(n, 1))) for n in range(1, 9)]
        await asyncio.sleep(0.01)
        model.gate.set()
        return await asyncio.gather(first, *rest)

    serve(work, model)
    assert [len(batch) for batch in model.batches] == [1, 8]


def test_a_bad_job_fails_alone():
    model = Model(fails=lambda jobs: any(job.number == 5 for job in jobs))

    async def work(batcher):
        return await asyncio.gather(
            *(batcher.submit(Job(n, 1)) for n in range(8)), return_exceptions=True
        )

    answers = serve(work, model)
    assert isinstance(answers[5], MemoryError)
    assert [a for n, a in enumerate(answers) if n != 5] == [0, 10, 20, 30, 40, 60, 70]


def test_a_batch_too_large_for_the_memory_is_split():
    model = Model(fails=lambda jobs: len(jobs) > 3)

    async def work(batcher):
        return await asyncio.gather(*(batcher.submit(Job(n, 1)) for n in range(8)))

    assert serve(work, model) == [n * 10 for n in range(8)]
    assert [len(batch) for batch in model.batches] == [8, 4, 2, 2, 4, 2, 2]


def test_a_failed_batch_frees_what_it_held_before_its_halves_run():
    class Tensor:
        pass

    held, alive = [], []

    def run(jobs, callers):
        gc.collect()
        alive.append(sum(ref() is not None for ref in held))
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        if len(jobs) > 1:
            raise MemoryError
        callers.answer(0, jobs[0].number)

    model = Model()
    model.run = run

    async def work(batcher):
        return await asyncio.gather(*(batcher.submit(Job(n, 1)) for n in range(4)))

    assert serve(work, model) == [0, 1, 2, 3]
    assert alive == [0] * 7


def test_an_idle_batcher_holds_no_answers():
    class Scores:
        pass

    held = []

    def run(jobs, callers):
        scores = Scores()
        held.append(weakref.ref(scores))
        callers.answer(0, scores)

    model = Model()
    model.run = run

    async def work(batcher):
        await batcher.submit(Job(0, 1))
        await asyncio.sleep(0.05)
        gc.collect()
        return held[0]() is None

    assert serve(work, model)


def test_a_cancelled_job_is_dropped_unrun():
    model = Model()
    model.gate.clear()

    async def work(batcher):
        first = asyncio.create_task(batcher.submit(Job(0, 1)))
        await entered(model)
        gone, stays = (asyncio.create_task(batcher.submit(Job(n, 1))) for n in (1, 2))
        await asyncio.sleep(0.01)
        gone.cancel()
        model.gate.set()
        return await asyncio.gather(first, gone, stays, return_exceptions=True)

    answers = serve(work, model)
    assert answers[0] == 0
    assert isinstance(answers[1], asyncio.CancelledError)
    assert answers[2] == 20
    assert model.batches == [[0], [2]]


def test_a_running_batch_sees_who_still_waits():
    seen = []
    model = Model()

    def run(jobs, callers):
        model.entered.set()
        model.gate.wait(10)
        seen.append(callers.waiting())
        for index in (0, 2):
            callers.answer(index, 0)

    model.gate.clear()
    model.run = run

    async def work(batcher):
        tasks = [asyncio.create_task(batcher.submit(Job(n, 1))) for n in range(3)]
        await entered(model)
        tasks[1].cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    serve(work, model)
    assert seen == [[True, False, True]]


def test_an_answer_does_not_wait_for_the_rest_of_its_batch():
    model = Model()

    def run(jobs, callers):
        callers.answer(1, "early")
        assert model.gate.wait(10)  # until the early answer has arrived
        for index in range(len(jobs)):
            callers.answer(index, "late")

    model.run = run
    model.gate.clear()

    async def work(batcher):
        tasks = [asyncio.create_task(batcher.submit(Job(n, 1))) for n in range(3)]
        early = await tasks[1]
        model.gate.set()
        return early, await tasks[0], await tasks[2]

    assert serve(work, model) == ("early", "late", "late")


def test_a_batch_that_fails_late_is_not_run_again_for_those_it_answered():
    model = Model()

    def run(jobs, callers):
        model.batches.append([job.number for job in jobs])
        callers.answer(0, "answered")
        if len(jobs) > 1:
            raise MemoryError

    model.run = run

    async def work(batcher):
        return await asyncio.gather(*(batcher.submit(Job(n, 1)) for n in range(4)))

    assert serve(work, model) == ["answered"] * 4
    assert model.batches == [[0, 1, 2, 3], [1], [2, 3], [3]]


def test_closing_fails_waiting_and_running_jobs():
    model = Model()
    model.gate.clear()

    async def work(batcher):
        running = asyncio.create_task(batcher.submit(Job(0, 1)))
        await entered(model)
        waiting = asyncio.create_task(batcher.submit(Job(1, 1)))
        await asyncio.sleep(0.01)
        await batcher.close()
        return await asyncio.gather(running, waiting, return_exceptions=True)

    answers = serve(work, model)
    assert [type(answer) for answer in answers] == [UnavailableError, UnavailableError]


def test_two_queues_of_one_thread_take_turns():
    order = []

    def worker(name):
        def run(jobs, callers):
            order.append(name)
            callers.answer(0, 0)

        return run

    async def scenario():
        with ThreadPoolExecutor(1) as thread:
            queues = [Batcher(worker(n), thread, max_batch_tokens=1) for n in ("score", "generate")]
            await asyncio.gather(*(q.submit(Job(n, 1)) for q in queues for n in range(6)))
            await asyncio.gather(*(q.close() for q in queues))

    asyncio.run(scenario())
    assert sorted(order) == ["generate"] * 6 + ["score"] * 6
    assert max(len(list(turns)) for _, turns in itertools.groupby(order)) <= 2


def test_a_single_failure_keeps_its_own_exception():
    model = Model(fails=lambda jobs: True)
    with pytest.raises(MemoryError, match="no room for 1"):
        serve(lambda batcher: batcher.submit(Job(0, 1)), model)
