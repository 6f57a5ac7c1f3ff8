"""What a terminal can show, and what a log of a CI cannot."""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO

Style = Literal["dim", "bold", "green", "yellow", "red", "cyan"]

_CODES: dict[Style, int] = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


def has_colours(stream: TextIO) -> bool:
    """Whether escapes become colours there; NO_COLOR (no-color.org) and TERM=dumb say no."""
    return (
        stream.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def can_move() -> bool:
    """Whether a line on standard error can be written over: a terminal's, or a notebook's."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def no_bars_in_logs() -> None:
    """Keep bars of the Hub's client, and of transformers with it, out of what is no terminal.

    Before those are imported, which read this when they are.
    """
    if not can_move():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def painted(text: str, style: Style, colours: bool) -> str:
    """Each line in colour, so that what cuts or indents lines does not spread it."""
    if not colours:
        return text
    code = _CODES[style]
    return "\n".join(f"\033[{code}m{line}\033[0m" if line else "" for line in text.split("\n"))
