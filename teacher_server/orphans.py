"""An engine's processes end with the server, even if it is killed while they load."""

from __future__ import annotations

import os
import sys
import threading
import time

_POLL_SECONDS = 0.2


def end_with_parent() -> None:
    """In a process that multiprocessing has spawned: end it when its parent has gone.

    Called where the server's main module is imported. A spawned process imports that again before
    anything else, so vLLM's engine and workers, each the parent of the next, are watched from the
    beginning. vLLM's own watch begins when a worker has loaded, and there is none for an engine.
    """
    if "__mp_main__" in sys.modules:  # how multiprocessing calls the main module there
        watch = threading.Thread(
            target=_end_after, args=(os.getppid(),), name="end-with-parent", daemon=True
        )
        watch.start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:  # an orphan gets another parent
        time.sleep(_POLL_SECONDS)
    os._exit(1)
