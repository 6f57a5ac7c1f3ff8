"""Equal questions at the same time are computed once."""

import asyncio

import pytest

from teacher_server.limits.single_flight import SingleFlight


class Model:
    """Answers with the number of the computation, once it is let."""

    def __init__(self):
        self.begun = self.cancelled = 0
        self.release = asyncio.Event()
        self.error = None

    async def compute(self):
        self.begun += 1
        number = self.begun
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return number


def run(scenario):
    async def main():
        model, shared = Model(), []
        single_flight = SingleFlight(lambda: shared.append(1))
        asked = []

        def ask(key):
            asked.append(key)
            return asyncio.ensure_future(single_flight.run(key, model.compute))

        await scenario(model, ask)
        assert single_flight._work == {}
        assert len(shared) == len(asked) - model.begun

    asyncio.run(main())


async def asked(*calls):
    for _ in range(5):
        await asyncio.sleep(0)
    return calls


def test_equal_questions_are_computed_once_and_others_are_not():
    async def scenario(model, ask):
        calls = await asked(ask(b"a"), ask(b"b"), ask(b"a"))
        model.release.set()
        assert await asyncio.gather(*calls) == [1, 2, 1]

    run(scenario)


def test_what_is_answered_is_computed_anew():
    async def scenario(model, ask):
        model.release.set()
        assert [await ask(b"a"), await ask(b"a")] == [1, 2]

    run(scenario)


def test_one_who_leaves_takes_nobody_elses_answer():
    async def scenario(model, ask):
        first, second = await asked(ask(b"a"), ask(b"a"))
        first.cancel()
        await asked()
        model.release.set()
        assert await second == 1
        assert model.cancelled == 0

    run(scenario)


def test_work_that_nobody_waits_for_is_cancelled_and_its_question_free_again():
    async def scenario(model, ask):
        calls = await asked(ask(b"a"), ask(b"a"))
        for call in calls:
            call.cancel()
        await asked()
        assert (model.begun, model.cancelled) == (1, 1)
        model.release.set()
        assert await ask(b"a") == 2

    run(scenario)


def test_a_failure_is_told_to_all_who_asked():
    async def scenario(model, ask):
        model.error = ZeroDivisionError("in the model")
        calls = await asked(ask(b"a"), ask(b"a"))
        model.release.set()
        for call in calls:
            with pytest.raises(ZeroDivisionError, match="in the model"):
                await call
        assert model.begun == 1

    run(scenario)
