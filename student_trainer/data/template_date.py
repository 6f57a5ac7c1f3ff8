"""The date that chat templates print, stored with the results of a run.

Templates of Llama 3.2, gpt-oss, Granite and SmolLM3 print today's date into every prompt. A run
that is resumed tomorrow, or a cache that is read tomorrow, needs the prompts of its first day.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from shared.errors import ConfigurationError

FILE = "chat_template_date.txt"


def read_date(given: str | None, folders: Iterable[Path]) -> datetime.date:
    """Return the date to print: the given one, else the first one in a folder, else today.

    Args:
        given: as YYYY-MM-DD, or None.
        folders: folders in which `keep_date` may have written a date.

    Raises:
        ConfigurationError: a text is not a date; names the flag or file.
    """
    if given is not None:
        return _parsed(given, "--chat_template_date")
    for folder in folders:
        file = folder / FILE
        if file.exists():
            return _parsed(file.read_text().strip(), str(file))
    return datetime.date.today()


def keep_date(date: datetime.date, folders: Iterable[Path]) -> None:
    """Write the date into each folder that holds none yet."""
    for folder in folders:
        file = folder / FILE
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{date.isoformat()}\n")


def _parsed(text: str, where: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"{where} {text!r} must be a date such as 2026-01-31") from error
