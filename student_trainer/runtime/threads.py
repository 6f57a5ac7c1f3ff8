"""Run work in background threads, and end a process that has some."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NoReturn, TypeVar
from weakref import WeakSet

from student_trainer.runtime.compat import run_exit_functions

R = TypeVar("R")

_PATIENCE = 2.0  # seconds in all; a client that is closed ends its threads much sooner
_QUIET_LOOKS = 5  # a thread that sleeps in each of them is idle
_threads: WeakSet[threading.Thread] = WeakSet()


def in_thread(function: Callable[[], R], *, name: str) -> Future[R]:
    """Run a function in a daemon thread, and return its outcome as a future.

    A process that fails must not wait for answers that nobody needs, while other ranks wait for it.
    (Threads of a `ThreadPoolExecutor` are joined at exit.)
    """
    outcome: Future[R] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # raised where the outcome is read
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return outcome


def wait_for_gloo() -> None:
    """Wait until Gloo's threads have released what the last collective operations used.

    A thread that releases a tensor while the interpreter is finalized aborts the process (see
    `end_process`). The threads stay, since DistributedDataParallel keeps their group even when it
    is deleted and the group destroyed; but one that sleeps holds nothing. Call it after the last
    collective operation of a function whose caller may end the process.
    """
    until, quiet = time.monotonic() + _PATIENCE, 0
    while quiet < _QUIET_LOOKS and time.monotonic() < until:
        states = _gloo_states()
        if not states:
            return
        quiet = quiet + 1 if set(states) == {"S"} else 0
        time.sleep(0.01)  # so that a thread which waits for the interpreter's lock gets it


def _gloo_states() -> list[str]:
    """Return the state of each of Gloo's worker threads, as Linux tells: S sleeps, R runs."""
    states = []
    for task in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            name, _, rest = task.read_text().partition("(")[2].rpartition(")")
            if name == "pt_gloo_runloop":
                states.append(rest.split()[0])
    return states


@atexit.register
def _wait_for_threads() -> None:
    """Wait for daemon threads, because one inside PyTorch at exit aborts the process."""
    until = time.monotonic() + _PATIENCE
    for thread in list(_threads):
        thread.join(max(0.0, until - time.monotonic()))


def end_process(code: int) -> NoReturn:
    """End the program, without finalizing the interpreter where a launcher has started it.

    After a collective operation Gloo's threads release its tensors at some later time. One that
    does so while the interpreter is finalized aborts the process, and so the whole run (PyTorch
    issue 190489). `destroy_process_group` is no remedy, because DistributedDataParallel keeps the
    threads.
    """
    if "LOCAL_RANK" not in os.environ:
        sys.exit(code)
    run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
