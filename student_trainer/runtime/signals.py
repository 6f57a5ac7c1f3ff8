"""Turn signals that end a process into exceptions and events, so that it can clean up."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


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
def stop_event(
    patience: float, remind: Callable[[], None], told: Callable[[], None] = lambda: None
) -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM or SIGINT (Ctrl-C) sets; a second one ends the process.

    A signal that is ignored or handled stays so. Whoever handles SIGTERM takes the block for a part
    of something larger, which Ctrl-C must end too, so SIGINT is then left alone. Outside the main
    thread, which gets the signals, this does nothing.

    Args:
        patience: seconds after the first one, from which on ``remind`` interrupts the main thread
            every second; it may raise. Infinite for never.
        told: called in a thread of its own after the first one, to say so.
    """
    event = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield event
        return
    before: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.default_int_handler

    def stop(number: int, frame: object) -> None:
        signal.signal(number, before[number])
        if event.is_set():  # a launcher may pass on Ctrl-C as SIGTERM
            return
        event.set()
        # The main thread may hold the lock of the stream that this writes to.
        threading.Thread(target=told, name="told-to-end", daemon=True).start()
        signal.signal(signal.SIGALRM, lambda number, frame: remind())
        if math.isfinite(patience):
            signal.setitimer(signal.ITIMER_REAL, patience, 1.0)

    for number in before:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        if event.is_set():
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ctrl_c_kept_from_children() -> Iterator[None]:
    """Start processes, inside the ``with`` block, that Ctrl-C in a terminal does not reach.

    A terminal sends SIGINT to all processes of the group, and an engine that ends at it takes the
    step with it that a told trainer still finishes. A blocked signal stays so in a process that is
    started, whatever handler it sets. SIGTERM ends it as ever.
    """
    resource_tracker.ensure_running()  # as it starts, it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
