"""The event loop's lag, and lines that strangers cause."""

import asyncio
import logging
import time

from teacher_server.http import event_loop, replies
from teacher_server.http.event_loop import (
    OncePerMinute,
    limit_log_lines,
    survive_full_tables,
    watch_lag,
)


def test_a_stall_is_seen():
    async def work():
        lags = []
        watching = asyncio.create_task(watch_lag(lags.append))
        await asyncio.sleep(0.1)
        time.sleep(0.3)
        await asyncio.sleep(0.05)
        watching.cancel()
        return lags

    assert 0.25 < max(asyncio.run(work())) < 5


def test_of_the_same_warning_one_a_minute_passes_with_the_number_of_the_others(caplog):
    logger = logging.getLogger("test.once")
    fence = OncePerMinute(0.2)
    logger.addFilter(fence)
    try:
        for number in range(100):
            logger.warning("refused %d", number)
            logger.error("an error")
        time.sleep(0.25)
        logger.warning("refused %d", 100)
    finally:
        logger.removeFilter(fence)
    told = [line for line in caplog.messages if "refused" in line]
    assert told == ["refused 0", "refused 100 (99 more since the last of these lines)"]
    assert caplog.messages.count("an error") == 100


def test_a_full_table_of_descriptors_is_one_line_without_traceback(caplog):
    loop = asyncio.new_event_loop()
    try:
        survive_full_tables(loop)
        for error, message in ((OSError(24, "Too many open files"), "socket.accept() out of "
                                "system resource"), (ValueError("x"), "another")):  # fmt: skip
            loop.call_exception_handler({"message": message, "exception": error})
    finally:
        loop.close()
    first, second = caplog.records
    assert first.exc_info is None
    assert "No descriptor is free" in first.getMessage()
    assert second.exc_info


def test_what_strangers_cause_is_logged_where_lines_are_limited():
    loggers = [logging.getLogger("uvicorn.error"), event_loop.logger, replies.logger]
    before = [list(logger.filters) for logger in loggers]
    try:
        limit_log_lines()
        for logger, filters in zip(loggers, before, strict=True):
            (added,) = [one for one in logger.filters if one not in filters]
            assert isinstance(added, OncePerMinute)
    finally:
        for logger, filters in zip(loggers, before, strict=True):
            logger.filters[:] = filters
