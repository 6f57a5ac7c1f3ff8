"""Back-pressure, deadlines, and callers who leave."""

import asyncio
import time

import pytest

from shared.errors import DeadlineExceededError, OverloadedError, UnavailableError
from teacher_server.admission import Admission, ClientGoneError
from teacher_server.metrics import Metrics


def admission(tokens=100, timeout=5.0):
    metrics = Metrics()
    door = Admission(tokens, 1000, timeout, metrics)
    door.metrics = metrics
    return door


async def forever():
    await asyncio.Event().wait()


def queued(door):
    value = door.metrics.registry.get_sample_value
    return value("teacher_queued_tokens"), value("teacher_queued_jobs")


def test_tokens_are_held_while_the_request_runs():
    door = admission()
    with door.admit("a", 60, 3):
        assert queued(door) == (60, 3)
        with door.admit("b", 40, 1):
            assert queued(door) == (100, 4)
    assert queued(door) == (0, 0)


def test_a_full_queue_refuses_with_numbers_and_a_time_to_wait():
    door = admission()
    with door.admit("a", 60, 1):
        with pytest.raises(OverloadedError, match=r"60 tokens.*brings 41.*limit is 100") as refusal:
            door.admit("b", 41, 1).__enter__()
        assert refusal.value.retry_after >= 1
    with door.admit("b", 41, 1):
        assert queued(door) == (41, 1)


def test_a_failed_request_gives_its_place_back():
    door = admission()
    with pytest.raises(KeyError), door.admit("a", 100, 1):
        raise KeyError
    assert queued(door) == (0, 0)


def test_a_draining_server_admits_nothing():
    door = admission()
    door.draining = True
    with pytest.raises(UnavailableError, match="shutting down") as refusal:
        door.admit("a", 1, 1).__enter__()
    assert refusal.value.retry_after >= 1


def test_the_deadline_cancels_the_work():
    cancelled = []

    async def work():
        try:
            await forever()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    since = time.monotonic()
    with pytest.raises(DeadlineExceededError, match=r"within 0\.05 s"):
        asyncio.run(admission(timeout=0.05).run(work(), forever))
    assert cancelled == [True]
    assert time.monotonic() - since < 2


def test_a_caller_who_leaves_cancels_the_work():
    cancelled = []

    async def work():
        try:
            await forever()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def leaves():
        await asyncio.sleep(0.01)

    with pytest.raises(ClientGoneError):
        asyncio.run(admission().run(work(), leaves))
    assert cancelled == [True]


def test_the_result_and_the_exception_of_the_work_come_through():
    async def fine():
        return 7

    async def fails():
        raise ZeroDivisionError

    assert asyncio.run(admission().run(fine(), forever)) == 7
    with pytest.raises(ZeroDivisionError):
        asyncio.run(admission().run(fails(), forever))
