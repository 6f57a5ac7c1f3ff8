"""Tell what a terminal can show, and colour text for it."""

from __future__ import annotations

import os
from typing import Literal, TextIO

Style = Literal["dim", "bold", "green", "yellow", "red", "cyan"]

_CODES: dict[Style, int] = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


def has_colours(stream: TextIO) -> bool:
    """Return whether a stream shows colours; NO_COLOR (no-color.org) and TERM=dumb say no."""
    return (
        stream.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def width_of(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream is, or None where it is none.

    COLUMNS, if set, comes first.
    """
    if not stream.isatty():
        return None
    try:  # not of shutil, which looks at standard output alone, and that may be a file
        own = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        own = 0
    given = os.environ.get("COLUMNS", "")
    return (int(given) if given.isdecimal() else own) or 80


def encodable(text: str, stream: TextIO) -> str:
    """Return the text with ASCII in the place of what the stream cannot encode."""
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return text.translate({ord("·"): "|", ord("→"): "->", ord("…"): "..."})
    return text


def readable_size(count: float) -> str:
    """Return a number of bytes in the unit that suits it, up to GiB."""
    unit = min(3, max(0, int(count).bit_length() - 1) // 10)
    text = f"{count / 1024**unit:,.{0 if unit == 0 else 1}f}"
    return f"{text} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"


def painted(text: str, style: Style, colours: bool) -> str:
    """Return the text with each line coloured by itself, or as it is without ``colours``.

    So what cuts or indents lines does not spread the colour.
    """
    if not colours:
        return text
    code = _CODES[style]
    return "\n".join(f"\033[{code}m{line}\033[0m" if line else "" for line in text.split("\n"))
