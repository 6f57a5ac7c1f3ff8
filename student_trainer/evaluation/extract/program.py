"""The definition of the entry point in an answer, and the program around it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from student_trainer.evaluation.extract.assemble import assembled
from student_trainer.evaluation.extract.body import body_of
from student_trainer.evaluation.extract.parser import Parser
from student_trainer.evaluation.extract.prompt import header_of, read_prompt
from student_trainer.evaluation.extract.segments import Segment, dedented, split_at_fences
from student_trainer.evaluation.extract.statements import SCOPES, Statement, defines, is_stub
from student_trainer.evaluation.extract.text import indentation, normalized, readings

_VIEWS = 12  # most indented definitions or inline codes of one segment
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_HEADER = re.compile(r"[ \t]*(?:class|def|async|if|elif|else|for|while|with|try|except)\b.*:")
_BLOCK = re.compile(r"(?:class|def|async|if|elif|else|for|while|with|try|except|@)(?!\w)")
_REPL = re.compile(r"[ \t]*(?:>>>|\.\.\.|In \[\d+\]:|\.\.\.:)(?: |$)")


def extract_code(completion: str, *, prompt: str, entry_point: str, truncated: bool = False) -> str:
    """Return a program that defines ``entry_point`` as the completion does.

    Args:
        completion: what the model wrote.
        prompt: the code that it continues; its lines before the function stay in front. Text that
            is no code is ignored.
        entry_point: name of the function, or of another callable.
        truncated: the completion reached its length limit; thoughts that were never closed are
            then no answer.

    Returns:
        source text; where no definition was found one line that raises a NameError.
    """
    reader = _Reader(normalized(prompt), entry_point)
    found = None
    for variant in readings(completion, truncated):
        code, complete = reader.solve(variant)
        if code is not None and (found is None or complete):
            found = code
        if complete:
            break
    missing = f"the answer has no definition of {entry_point}"
    return f"raise NameError({missing!r})\n" if found is None else found


@dataclass(frozen=True)
class _Definition:
    """The statements of a segment that define the entry point."""

    statements: tuple[Statement, ...]
    stub: bool
    complete: bool
    fenced: bool
    closed: bool
    at: int


class _Reader:
    """A reader of one answer, within a budget."""

    def __init__(self, prompt: str, entry_point: str) -> None:
        self._parser = Parser()
        self._prompt = read_prompt(prompt, entry_point, self._parser)
        self._named = re.compile(rf"(?<!\w){re.escape(entry_point)}(?!\w)")
        self._header = header_of(entry_point)

    def solve(self, text: str) -> tuple[str | None, bool]:
        """Return the program, and whether nothing of it was cut."""
        segments = split_at_fences(text)
        first = segments[0]
        if not first.fenced:
            body = body_of(first.lines, self._prompt, self._parser)
            if body is not None:
                return assembled(self._prompt, body, []), True
        definitions: list[_Definition] = []
        pool: list[list[Statement]] = []
        for at, segment in enumerate(segments):
            statements, definition = self._definition(segments, at, segment)
            pool.append(statements)
            if definition is not None:
                definitions.append(definition)
        chosen = _chosen([d for d in definitions if not d.stub])
        if chosen is not None:
            others = [*pool[: chosen.at], *pool[chosen.at + 1 :]]
            code = assembled(self._prompt, chosen.statements, others)
            return code, chosen.complete and chosen.closed
        for segment in [s for s in segments if s.fenced] + [
            replace(s, lines=tuple(run)) for s in segments if not s.fenced for run in _runs(s.lines)
        ]:
            body = body_of(segment.lines, self._prompt, self._parser)
            if body is not None:
                return assembled(self._prompt, body, pool), segment.closed
        stub = _chosen(definitions)
        return (None if stub is None else assembled(self._prompt, stub.statements, pool)), False

    def _definition(
        self, segments: Sequence[Segment], at: int, segment: Segment
    ) -> tuple[list[Statement], _Definition | None]:
        """Return all statements of a segment, and its definition of the entry point."""
        text = "\n".join(segment.lines)
        statements, cut = self._parser.islands(dedented(segment.lines))
        found = self._as_definition(statements, cut, segment, at)
        if (found and found.complete) or not self._named.search(text):
            return statements, found
        for view in self._views(segment, text):
            other = self._as_definition(*self._parser.islands(view), segment, at)
            if other is not None and (found is None or other.complete):
                found = other
                break
        if (found is None or not found.complete) and self._header.search(text):
            for width in (3, 5):  # rejoin what fences in a docstring or in a longer fence split
                joined = segments[at : at + width]
                if len(joined) == width:
                    lines = [line for part in joined for line in part.raw][:-1]
                    other = self._as_definition(*self._parser.islands(dedented(lines)), segment, at)
                    if other is not None and other.complete:
                        return list(other.statements), other
        return statements, found

    def _views(self, segment: Segment, text: str) -> Iterator[Sequence[str]]:
        """Yield other readings of a segment: a session, an indented definition, inline code."""
        lines = segment.lines
        if any(_REPL.match(line) for line in lines):
            yield [_REPL.sub("", line, count=1) for line in lines if _REPL.match(line)]
        indented = [m for m in self._header.finditer(text) if m[1]]
        for match in indented[:_VIEWS]:
            if self._parser.exhausted:
                return
            number, width = text.count("\n", 0, match.start()), match[1]
            outer = next(
                (x for x in reversed(lines[:number]) if x.strip() and not x.startswith(width)), ""
            )
            if not _HEADER.match(outer):  # else it is a method or a nested function
                yield [line.removeprefix(width) for line in lines]
        inline = [m[1].strip() for m in _INLINE_CODE.finditer(text) if self._header.match(m[1])]
        for code in inline[:_VIEWS]:
            yield [code]

    def _as_definition(
        self, statements: Sequence[Statement], cut: frozenset[int], segment: Segment, at: int
    ) -> _Definition | None:
        defining = [
            i
            for i, s in enumerate(statements)
            if self._prompt.entry_point in s.binds and defines(s, self._prompt.entry_point)
        ]
        if not defining:
            return None
        ranked = [(not is_stub(statements[i].node), i not in cut) for i in defining]
        best = max(ranked)
        good = [i for i, rank in zip(defining, ranked, strict=True) if rank == best]
        # A name bound twice in a fence has its last meaning, as in Python.
        kept = set(good if segment.fenced else good[:1])
        kept.update(i for i in defining if not isinstance(statements[i].node, SCOPES))
        own = tuple(s for i, s in enumerate(statements) if i not in defining or i in kept)
        return _Definition(own, not best[0], best[1], segment.fenced, segment.closed, at)


def _runs(lines: Sequence[str]) -> list[list[str]]:
    """Return a few runs of indented lines between prose, without those below a code header."""
    runs: list[list[str]] = [[]]
    header = False
    for line in lines:
        if line.strip() and not indentation(line):
            runs.append([])
            header = _BLOCK.match(line) is not None
        elif not header and (line.strip() or runs[-1]):
            runs[-1].append(line)
    return [run for run in runs if run][:_VIEWS]


def _chosen(definitions: Sequence[_Definition]) -> _Definition | None:
    if not definitions:
        return None
    best = max((d.complete, d.closed) for d in definitions)
    good = [d for d in definitions if (d.complete, d.closed) == best]
    fenced = [d for d in good if d.fenced]
    return fenced[-1] if fenced else good[0]
