"""Make untrusted text safe to show on a terminal, in a log or in a report."""

from __future__ import annotations

import re

LONGEST_LINE = 2_000  # characters


def printable(text: str) -> str:
    """Return the text with escaped control characters; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else _spelled(c) for c in text)


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Return the text as one line: line breaks are escaped too, and a long text is cut."""
    cut = text if len(text) <= longest else text[:longest] + " …"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else _spelled(c) for c in cut)


def code_span(text: str) -> str:
    """Return a Markdown code span that shows the text unchanged, on one line.

    Source: CommonMark 0.31, 6.1: a code span ends only at as many backticks as it began with.
    """
    text = one_line(text)
    runs = {len(run) for run in re.findall("`+", text)}
    fence = "`" * next(length for length in range(1, len(text) + 2) if length not in runs)
    pad = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()
