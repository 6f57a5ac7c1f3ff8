"""A process that is told to end clears up first."""

import math
import os
import signal
import threading

import pytest

from student_trainer.runtime.signals import signals_as_exits, stop_event


@pytest.fixture(autouse=True)
def defaults():
    """Also where the tests themselves run under nohup."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_would_end_the_process_raises(number):
    with pytest.raises(SystemExit) as caught, signals_as_exits():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_as_exits():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_ctrl_c_is_left_alone_where_sigterm_is_handled(monkeypatch):
    """A study or the quickstart must end by it, and not go on with a model half-trained."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with pytest.raises(KeyboardInterrupt), stop_event(math.inf, lambda: None) as event:
        os.kill(os.getpid(), signal.SIGINT)
    assert not event.is_set()


def test_the_first_signal_sets_the_event_and_says_so_and_handlers_are_put_back():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = threading.Event()
    with stop_event(math.inf, lambda: None, said.set) as event:
        os.kill(os.getpid(), signal.SIGINT)
        assert event.is_set()
        assert said.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes Ctrl-C on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
