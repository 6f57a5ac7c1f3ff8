"""Work in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


def in_thread(function: Callable[[], R], *, name: str) -> Future[R]:
    """The function's outcome, from a daemon thread.

    A process that fails must not wait for answers that nobody needs, while other ranks wait for
    it. (Threads of a `ThreadPoolExecutor` are joined at exit.)
    """
    outcome: Future[R] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # is raised where the outcome is asked for
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome
