"""Write log records to stderr, as text for people or as JSON lines for machines.

A record has fields beside its message: `logging`'s own ``extra``, and those that `bound` or `bind`
add to all records of a context, such as the id of a request.
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

# The switches of huggingface_hub, which transformers reads too, and of datasets.
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_VLLM_LOGGING = Path(__file__).parent / "vllm_logging.json"  # vLLM's own processes read it

_fields: ContextVar[Mapping[str, Any]] = ContextVar("_fields", default=MappingProxyType({}))
# Attributes that every record has, and uvicorn's coloured copy of the message.
_NO_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "vllm_process_name",
}


def bind(**fields: Any) -> None:
    """Add fields to all later records of this thread or task and of those it starts."""
    _fields.set({**_fields.get(), **fields})


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Add fields to all records inside the block; fields bound inside it end with it."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def bound_field(name: str) -> Any:
    """Return the value bound to a field here, or None."""
    return _fields.get().get(name)


class TextFormatter(logging.Formatter):
    """A formatter that appends the bound fields to the message and leaves out ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        # Untrusted text in a message or traceback must not control the terminal.
        return printable(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = " ".join(f"{name}={value}" for name, value in _fields.get().items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """A formatter that writes a record as one JSON object a line, in ASCII.

    The object holds time (ISO 8601, UTC), level, logger, message and the fields. A traceback, if
    there is one, is the field ``exception``.
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


def can_move() -> bool:
    """Return whether a line on standard error can be overwritten, as in terminals and notebooks."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def setup(form: LogFormat, *, level: str, text: str) -> None:
    """Configure logging to stderr; with JSON, nothing else is written there.

    Warnings and crashes are logged then. Without a terminal, and with JSON, the bars of libraries
    are turned off, such as those of loading weights. Call it before the libraries are imported,
    because they read the environment at import.

    Args:
        form: text or JSON.
        level: the least level that is logged.
        text: format of text lines, in `logging`'s own notation.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(text))
    # A program that embeds this one keeps its own handlers unless it asks for JSON.
    logging.basicConfig(level=level.upper(), handlers=[handler], force=form == "json")
    if form == "json" or not can_move():
        for name in _BARS:
            os.environ.setdefault(name, "1")
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
    """Return whether `setup` was to log JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)


def adopt(*libraries: str) -> None:
    """Remove the handlers of libraries while logging JSON, so that their records are JSON too."""
    for library in libraries if in_json() else ():
        logger = logging.getLogger(library)
        logger.handlers.clear()
        logger.propagate = True


def log_failure(program: str, error: str) -> None:
    """Write to stderr why a command ends."""
    if in_json():
        logging.getLogger(program).critical("%s", error)
    else:
        sys.stderr.write(printable(f"{program}: error: {error}") + "\n")
