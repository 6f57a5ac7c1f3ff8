"""The prompt of a task, as the code that an answer continues."""

from __future__ import annotations

import re
from dataclasses import dataclass

from student_trainer.evaluation.extract.parser import Parser
from student_trainer.evaluation.extract.text import indentation


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what it says of the function to write.

    Attributes:
        text: the prompt as it is.
        entry_point: name of the function, or of another callable.
        preamble: lines before the function, which stay in front of the program.
        names: names that the preamble binds.
        indent: indentation of the function's body.
        continued: the prompt ends within the function.
    """

    text: str
    entry_point: str
    preamble: str
    names: frozenset[str]
    indent: str
    continued: bool


def header_of(entry_point: str) -> re.Pattern[str]:
    """Return a pattern of the line that begins a definition; its first group is the indentation."""
    name = re.escape(entry_point)
    return re.compile(
        rf"^([ \t]*)(?:(?:async[ \t]+)?def[ \t]+{name}|class[ \t]+{name}|{name}[ \t]*[:=])(?!\w)",
        re.MULTILINE,
    )


def read_prompt(text: str, entry_point: str, parser: Parser) -> Prompt:
    """Return the prompt with what it says of the function."""
    preamble, indent, continued = _parts(text, header_of(entry_point), parser)
    statements = parser.parsed(preamble.split("\n")) or []
    names = frozenset[str]().union(*(s.binds for s in statements))
    return Prompt(text, entry_point, preamble, names, indent, continued)


def _parts(text: str, header: re.Pattern[str], parser: Parser) -> tuple[str, str, bool]:
    """Return the lines before the function, its indentation, and if the prompt is code."""
    lines = text.rstrip().split("\n")
    found = [m for m in header.finditer(text) if not m[1]]
    if not found:
        whole = parser.parsed(lines)
        return ("" if whole is None else text), "    ", False
    number = text.count("\n", 0, found[-1].start())
    while number and lines[number - 1].startswith("@"):
        number -= 1
    before = text.split("\n")[:number]
    if parser.parsed(before) is None:
        statements, _ = parser.islands(before)
        before = [s.source for s in statements if s.binds]
    body = indentation(lines[-1]) if len(lines) > number + 1 else ""
    for line in lines[number + 1 :]:
        if line.lstrip().startswith(('"""', "'''", 'r"""')):
            body = indentation(line)
            break
    return "".join(line + "\n" for line in before), body or "    ", True
