"""The event loop: how late it is, and what it says when the machine has no descriptor left."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# Seconds between two looks; a stall is seen less this much at most.
_PERIOD = 0.01
_NO_DESCRIPTOR = "socket.accept() out of system resource"


class OncePerMinute(logging.Filter):
    """Lets one warning of a kind pass each minute, with the number of those left out.

    Whoever reaches the port can cause as many as he likes. Errors always pass.

    Args:
        seconds: the minute.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._last: dict[str, tuple[float, int]] = {}  # of each kind: when one passed, left out

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        now, kind = time.monotonic(), str(record.msg)
        since, left_out = self._last.get(kind, (-self._seconds, 0))
        if now - since < self._seconds:
            self._last[kind] = since, left_out + 1
            return False
        self._last[kind] = now, 0
        if left_out:
            record.msg = f"{kind} ({left_out} more since the last of these lines)"
        return True


def limit_log_lines() -> None:
    """Let what strangers cause fill no log: one line of a kind each minute."""
    for name in ("uvicorn.error", "teacher_server.http.replies", __name__):
        logging.getLogger(name).addFilter(OncePerMinute())


def survive_full_tables(loop: asyncio.AbstractEventLoop) -> None:
    """Say in one line that no descriptor is left, where asyncio writes thousands of tracebacks.

    It tries again a second later, in the same loop of accepting.
    """
    # ``limit_log_lines`` lets one of them pass each minute.
    loop.set_exception_handler(_report)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if context.get("message") != _NO_DESCRIPTOR:
        loop.default_exception_handler(context)
        return
    logger.warning(
        "No descriptor is free for another connection (%s); the limit is %d. Raise it with "
        "ulimit -n, or LimitNOFILE= in a unit of systemd",
        context.get("exception"), resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )  # fmt: skip


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Tell ``observe`` again and again how many seconds the loop is late; ends when cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _PERIOD
        await asyncio.sleep(_PERIOD)
        observe(max(0.0, loop.time() - due))
