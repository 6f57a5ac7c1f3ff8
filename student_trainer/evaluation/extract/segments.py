"""The segments of an answer: what stands between its fence markers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from student_trainer.evaluation.extract.text import indentation

_MARKERS = 400  # most fence markers of one answer that are read
_MARKER = re.compile(
    r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<tag>[\w+#.:-]*)(?P<rest>[^\n]*)$"
)
_PREFIX = re.compile(r"^[\s>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?[\s>]*$")
_CODE_LINE = re.compile(r"[ \t]*(?:def|async|class|import|from|return|@)\b|[ \t]*\w+[ \t]*=[^=]")


@dataclass(frozen=True)
class Segment:
    """The lines between two fence markers.

    Attributes:
        lines: without what stands before the fence (a quote's ``>``, a list's indentation).
        raw: the lines as they are, and the marker after them.
        fenced: whether they are inside a fence, as Markdown pairs them.
        closed: whether a marker follows, or none opened it.
    """

    lines: tuple[str, ...]
    raw: tuple[str, ...]
    fenced: bool
    closed: bool


def split_at_fences(text: str) -> list[Segment]:
    """Split a text at its fence markers, paired as Markdown does."""
    segments: list[Segment] = []
    lines: list[str] = []
    opener: str | None = None
    prefix, markers = "", 0

    def close(marker: str | None) -> None:
        if segments or any(line.strip() for line in lines) or opener is None:
            stripped = tuple(_without_prefix(line, prefix) for line in lines)
            raw = (*lines, marker or "")
            closed = marker is not None or opener is None
            segments.append(Segment(stripped, raw, opener is not None, closed))
        lines.clear()

    for line in text.split("\n"):
        match = _MARKER.match(line) if "```" in line or "~~~" in line else None
        shorter = match is not None and opener is not None and len(match["fence"]) < len(opener)
        if match is None or shorter or markers >= _MARKERS:
            lines.append(line)
            continue
        markers += 1
        before, fence = match["before"], match["fence"]
        tag, rest = match["tag"], match["rest"]
        alone = _PREFIX.match(before) is not None
        if not alone:
            lines.append(before)
        close(line)
        inside = opener is not None
        if inside and not tag and not rest.strip():
            opener = None
            prefix = ""
        elif inside and alone and fence[0] != (opener or " ")[0] and tag == "":
            pass
        else:
            opener, prefix = fence, before if alone else ""
            code = f"{tag}{rest}" if _CODE_LINE.match(f"{tag}{rest}") else rest.strip()
            if _CODE_LINE.match(code):
                ended = re.sub(rf"{fence[0]}{{3,}}\s*$", "", code)
                lines.append(ended)
                if ended != code:
                    close(line)
                    opener, prefix = None, ""
    close(None)
    return segments or [Segment((), (), False, True)]


def dedented(lines: Sequence[str]) -> list[str]:
    """Return the lines without the indentation they share; strings keep their blank lines."""
    shared = os.path.commonprefix([indentation(line) for line in lines if line.strip()])  # noqa: RUF071
    return [line.removeprefix(shared) for line in lines]


def _without_prefix(line: str, prefix: str) -> str:
    if ">" in prefix:
        return re.sub(r"^[ \t]*(?:> ?){1,8}", "", line)
    space = indentation(prefix)
    return line.removeprefix(space)
