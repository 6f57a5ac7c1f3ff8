"""Turn signals that end a process into exceptions and events, so that it can clean up."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit in the block, where they would end the process.

    Signals that are ignored (nohup) or handled stay so. Other threads than the main one, which gets
    the signals, change nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if main and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def sigterm_event(patience: float, remind: Callable[[], None]) -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM sets; the second ends the process.

    A signal that is ignored or handled stays so. Outside the main thread, which gets the signals,
    this does nothing.

    Args:
        patience: seconds after the first one, from which on ``remind`` interrupts the main thread
            every second; it may raise. Infinite for never.
    """
    event = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield event
        return

    def ask(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, lambda number, frame: remind())
        if math.isfinite(patience):
            signal.setitimer(signal.ITIMER_REAL, patience, 1.0)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield event
    finally:
        if event.is_set():
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
