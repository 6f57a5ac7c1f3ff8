"""End an engine's processes with the server, even if it is killed while they load."""

from __future__ import annotations

import os
import sys
import threading
import time

_SERVER = "TEACHER_SERVER_PID"
_POLL_SECONDS = 0.2


def end_with_parent() -> None:
    """End a process that multiprocessing has spawned when its parent or the server has gone.

    Called where the server's main module is imported. A spawned process imports that again before
    anything else, so vLLM's engine and workers, each the parent of the next, are watched from the
    beginning. vLLM itself watches a worker only once it has loaded, and an engine never.
    """
    # In a spawned process __mp_main__ is the parent's main module; in the server both are one
    # module.
    if sys.modules.get("__mp_main__", sys.modules["__main__"]) is sys.modules["__main__"]:
        os.environ[_SERVER] = str(os.getpid())
        return
    watch = threading.Thread(
        target=_end_after, args=(os.getppid(), int(os.environ[_SERVER])), daemon=True
    )
    watch.start()


def _end_after(parent: int, server: int) -> None:
    # An orphan gets another parent; one that was orphaned before this began finds no server.
    while os.getppid() == parent and _exists(server):
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
