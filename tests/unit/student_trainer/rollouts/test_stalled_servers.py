"""Rollout servers that hang with open connections, and runs that are told to end meanwhile."""

from __future__ import annotations

import threading
import time

import pytest

from shared.errors import RolloutServerError
from tests.support.stub_rollout_server import send_no_weights, stub_rollout_servers
from tests.unit.student_trainer.rollouts.test_rollout_servers_stub import (
    expected,
    opened,
    tiny,
    write,
)

SECONDS = 0.8


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    send_no_weights(monkeypatch)


@pytest.fixture
def stubs():
    with stub_rollout_servers(2) as both:
        yield both
        for stub in both:
            stub.gate.set()


@pytest.mark.parametrize("answers", [True, False], ids=["counts nothing", "answers nothing"])
def test_what_a_hung_server_should_have_written_is_written_by_another(stubs, answers, caplog):
    with opened(tiny(), stubs, seconds=SECONDS) as both:
        both.sync(0)
        stubs[0].gate.clear()
        if not answers:
            stubs[0].before = lambda path: path == "/metrics" and stubs[0].gate.wait(30)
        began = time.monotonic()
        assert write(both) == expected()
        assert SECONDS < time.monotonic() - began < 10
        assert both.live == [stubs[1].url]
    assert sum("wrote no token for 0.8 s" in message for message in caplog.messages) == 1


def test_servers_that_all_hang_end_the_writing(stubs):
    with opened(tiny(), stubs, seconds=SECONDS) as both:
        both.sync(0)
        for stub in stubs:
            stub.gate.clear()
        with pytest.raises(RolloutServerError, match="no rollout server is left"):
            write(both)


@pytest.mark.parametrize("counts", [True, False], ids=["counted", "uncounted"])
def test_a_long_completion_is_waited_for_while_tokens_come(stubs, counts):
    slow = stubs[:1]
    with opened(tiny(), slow, seconds=SECONDS) as one:
        one.sync(0)
        slow[0].gate.clear()
        threading.Timer(3 * SECONDS, slow[0].gate.set).start()

        def look(path):
            slow[0].tokens += path == "/metrics"

        slow[0].before = look
        if not counts:  # --disable-log-stats
            slow[0].answers["/metrics"] = (200, b"")
        assert write(one) == expected()
        assert one.live == [slow[0].url]


@pytest.mark.parametrize("waits", ["/health", "/pause?mode=wait&clear_cache=true", "away"])
def test_a_run_that_is_told_to_end_waits_no_longer(stubs, waits):
    released = threading.Event()
    for stub in stubs:
        if waits == "away":
            stub.answers["/health"] = (503, {})
        stub.before = lambda path: path == waits and released.wait(30)
    try:
        with opened(tiny(), stubs, seconds=600.0) as both:
            threading.Timer(0.3, both.wait_no_longer).start()
            began = time.monotonic()
            with pytest.raises(RolloutServerError, match="told to end"):
                both.sync(0)
            assert time.monotonic() - began < 8
    finally:
        released.set()
