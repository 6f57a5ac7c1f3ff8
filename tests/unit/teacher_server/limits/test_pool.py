"""Threads that clients share: one keeps half of them at most, and who leaves gives way."""

import asyncio
import threading

import pytest

from teacher_server.limits.pool import FairPool


def test_a_client_that_floods_leaves_threads_to_another():
    gate = threading.Event()

    async def work():
        pool = FairPool(4)
        flood = [asyncio.create_task(pool.run("flood", 1, gate.wait)) for _ in range(50)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(pool.run("another", 1, lambda: 7), 5) == 7
        gate.set()
        assert await asyncio.gather(*flood) == [True] * 50

    asyncio.run(work())


def test_turns_are_counted_in_what_the_work_costs():
    """The client with small bodies is done before one with as many large ones."""
    gates, order = [threading.Event(), threading.Event()], []

    async def work():
        pool = FairPool(2)
        blockers = [
            asyncio.create_task(pool.run(name, 1, gate.wait))
            for name, gate in zip("xy", gates, strict=True)
        ]
        await asyncio.sleep(0.05)
        tasks = [
            asyncio.create_task(pool.run(client, cost, order.append, client))
            for _ in range(5)
            for client, cost in (("large", 1 << 20), ("small", 1 << 13))
        ]
        await asyncio.sleep(0.05)
        gates[0].set()  # one thread does all of it
        await asyncio.gather(*tasks)
        gates[1].set()
        await asyncio.gather(*blockers)

    asyncio.run(work())
    assert order.index("small") <= 1
    assert order[-4:] == ["large"] * 4


def test_who_leaves_gives_up_the_turn_and_what_has_begun_keeps_its_thread():
    gate, done = threading.Event(), []

    async def work():
        pool = FairPool(2)
        running = asyncio.create_task(pool.run("a", 1, gate.wait))
        waiting = asyncio.create_task(pool.run("a", 1, done.append, "waiting"))
        await asyncio.sleep(0.05)
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        last = asyncio.create_task(pool.run("a", 1, done.append, "last"))
        await asyncio.sleep(0.05)
        assert done == []  # the only thread that the client may have is still at work
        gate.set()
        await last

    asyncio.run(work())
    assert done == ["last"]


def test_what_the_function_raises_comes_through():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(FairPool(2).run("a", 1, lambda: 1 / 0))
