"""Back-pressure, deadlines, and callers who leave."""

import asyncio
import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DeadlineExceededError, OverloadedError, UnavailableError
from teacher_server.limits.admission import Admission, ClientGoneError, HeldBytes
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


def test_one_client_leaves_half_of_the_room_to_others():
    door = admission()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(door.admit("flood", 10, 1))
        with pytest.raises(OverloadedError, match=r"50 tokens of this client.* now 50 of 100"):
            door.admit("flood", 10, 1).__enter__()
        stack.enter_context(door.admit("another", 30, 1))
        stack.enter_context(door.admit("a third", 20, 1))
    with door.admit("flood", 100, 1):  # what it has given back counts no more
        assert queued(door) == (100, 1)


def test_a_client_with_many_tiny_sequences_leaves_room_to_others():
    door = admission(tokens=1 << 20)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(door.admit("flood", 1024, 1024))
        with pytest.raises(OverloadedError, match=r"8192 sequences of this client"):
            door.admit("flood", 1024, 1024).__enter__()
        stack.enter_context(door.admit("another", 1024, 1024))
    assert queued(door) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 60))))
def test_whoever_comes_finds_room_while_no_request_is_large(requests):
    """Each client leaves half of what it found, less one request, whatever the order."""
    room = admission(tokens=1000).tokens
    held = dict.fromkeys("abcd", 0)
    for client, amount in requests:
        with contextlib.suppress(OverloadedError):
            room.take(client, amount)
            held[client] += amount
    assert 1000 - sum(held.values()) >= 1000 / 2**4 - 60
    room.take("e", 1000 - sum(held.values()))


def test_bytes_are_held_until_they_are_freed():
    room = admission().bytes
    held = HeldBytes(room, "a")
    held.add(300)
    held.add(200)
    with pytest.raises(OverloadedError, match=r"500 bytes are queued and the request brings 501"):
        HeldBytes(room, "b").add(501)
    held.free()
    held.free()
    HeldBytes(room, "b").add(1000)


def test_draining_waits_for_what_was_admitted():
    door = admission()

    async def scenario():
        with door.admit("a", 1, 1):
            drained = asyncio.create_task(door.drain())
            await asyncio.sleep(0.01)
            assert door.draining
            assert not drained.done()
        await asyncio.wait_for(drained, 1)

    asyncio.run(scenario())


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
