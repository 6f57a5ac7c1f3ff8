"""Text of strangers, made safe to show: on a terminal, in a log, in a report."""

from __future__ import annotations

LONGEST_LINE = 2_000  # characters


def printable(text: str) -> str:
    """Return the text with its control characters spelled out; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else _spelled(c) for c in text)


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Return the text as one line: line breaks are spelled out too, and what is too long is cut."""
    cut = text if len(text) <= longest else text[:longest] + " …"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else _spelled(c) for c in cut)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()
