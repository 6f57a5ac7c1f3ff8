"""An engine's processes end with the server, even if it is killed while they load."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time


def end_with_parent() -> None:
    """In a process that multiprocessing has spawned: end it when its parent has gone.

    Called where the server's main module is imported. A spawned process imports that again before
    anything else, so vLLM's engine and workers, each the parent of the next, are watched from the
    beginning. vLLM's own watch begins when a worker has loaded, and there is none for an engine.
    """
    if "__mp_main__" in sys.modules:  # how multiprocessing calls the main module there
        threading.Thread(target=_wait_and_end, name="end-with-parent", daemon=True).start()


def _wait_and_end() -> None:
    while (parent := multiprocessing.parent_process()) is None:
        time.sleep(0.1)  # known when its arguments have been unpickled
    parent.join()
    os._exit(1)
