"""The event loop's lag, and its log lines when the machine has no descriptor left."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# Seconds between two measurements; a stall is measured at most this much too short.
_PERIOD = 0.01
_NO_DESCRIPTOR = "socket.accept() out of system resource"


class OncePerMinute(logging.Filter):
    """A log filter that passes one warning of a kind each minute and counts the others.

    Anyone who reaches the port can cause any number of warnings. Errors always pass.

    Args:
        seconds: between two warnings of a kind.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._last: dict[str, tuple[float, int]] = {}  # kind: (time of the last, left out since)

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
    """Limit the warnings that callers can cause to one of a kind each minute."""
    for name in ("uvicorn.error", "teacher_server.http.replies", __name__):
        logging.getLogger(name).addFilter(OncePerMinute())


def survive_full_tables(loop: asyncio.AbstractEventLoop) -> None:
    """Log one line when no descriptor is left, where asyncio writes thousands of tracebacks.

    asyncio tries to accept again a second later.
    """
    # `limit_log_lines` passes one of these lines each minute.
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
    """Call ``observe`` with the seconds by which the loop is late, until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _PERIOD
        await asyncio.sleep(_PERIOD)
        observe(max(0.0, loop.time() - due))
