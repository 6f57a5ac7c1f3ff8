"""Log records as lines on stderr: text for people, or a JSON object each for machines.

What belongs to a record beside its message are fields: `logging`'s own ``extra``, and what `bound`
or `bind` put around the code that logs, such as the id of the request it works for.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from shared.printable import printable

LogFormat = Literal["text", "json"]

_VLLM_LOGGING = Path(__file__).parent / "vllm_logging.json"  # its processes read it too

_fields: ContextVar[Mapping[str, Any]] = ContextVar("_fields", default=MappingProxyType({}))
# What every record has; uvicorn's coloured copy of the message tells nothing more.
_NO_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "vllm_process_name",
}


def bind(**fields: Any) -> None:
    """Add fields to all records from here on, in this thread or task and those it starts."""
    _fields.set({**_fields.get(), **fields})


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """As `bind`, until the end of the block; what was bound within it ends with it."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def bound_field(name: str) -> Any:
    """The value bound here; None where there is none."""
    return _fields.get().get(name)


class TextFormatter(logging.Formatter):
    """The message, and behind it the bound fields. What is in ``extra`` alone, messages say."""

    def format(self, record: logging.LogRecord) -> str:
        # A stranger's text, in a message or a traceback, shall not write over a terminal.
        return printable(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = " ".join(f"{name}={value}" for name, value in _fields.get().items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """One object a line, in ASCII: time (ISO 8601, UTC), level, logger, message, then the fields.

    A traceback, if there is one, is the field ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {key: value for key, value in vars(record).items() if key not in _NO_FIELDS}
        for name, value in {**_fields.get(), **extra}.items():
            line.setdefault(name, _representable(value))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _representable(value: Any) -> Any:
    # JSON has no NaN and no infinity.
    if isinstance(value, dict):
        return {key: _representable(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def setup(form: LogFormat, *, level: str, text: str) -> None:
    """Log to stderr from here on; what else writes there is silenced, or made to log, for JSON.

    Before the libraries are imported: what they read of the environment, they read then.

    Args:
        form: of the lines.
        level: the least that is logged.
        text: the line in `logging`'s own notation, for people.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(text))
    # A program that calls this one keeps its own handlers, unless it asks for JSON.
    logging.basicConfig(level=level.upper(), handlers=[handler], force=form == "json")
    if form == "json":
        logging.captureWarnings(True)
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(_VLLM_LOGGING))
        sys.excepthook = lambda *error: logging.critical("uncaught exception", exc_info=error)
        threading.excepthook = lambda error: logging.error(
            "uncaught exception in a thread",
            exc_info=(error.exc_type, error.exc_value, error.exc_traceback),  # type: ignore[arg-type]
        )


def in_json() -> bool:
    """Whether `setup` was told so."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)


def adopt(*libraries: str) -> None:
    """Let libraries that have brought handlers of their own log as all else does, in JSON."""
    for library in libraries if in_json() else ():
        logger = logging.getLogger(library)
        logger.handlers.clear()
        logger.propagate = True


def last_words(program: str, error: str) -> None:
    """Why a command ends, on stderr."""
    if in_json():
        logging.getLogger(program).critical("%s", error)
    else:
        sys.stderr.write(printable(f"{program}: error: {error}") + "\n")
