"""A parser of what may be Python, within a budget of characters."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

from student_trainer.evaluation.extract.statements import Statement, statement_of
from student_trainer.evaluation.extract.text import indentation

_BUDGET = 800_000  # characters parsed for one answer
_CALL = 200  # what a call of the parser costs beside its characters
_PREFIXES = 100  # most prefixes of one text that are tried
_LONGEST = 2_000  # most lines of one statement among lines of prose
_STATEMENT = re.compile(
    r"(?:async|def|class|import|from|if|for|while|with)\s|try\s*:|@"
    r"|[A-Za-z_][\w.\[\]'\", ]{0,200}(?::[^=\n]{1,200})?[-+*/|&]?=(?!=)|\w+\.[\w.]{1,200}\("
)
_OPEN = re.compile(r"[(\[{\\]|\"\"\"|'''")
_CONTINUES = re.compile(r"[)\]}]|(?:else|elif|except|finally)\b")


class Parser:
    """A parser of one answer, within a budget."""

    def __init__(self) -> None:
        self._left = _BUDGET

    @property
    def exhausted(self) -> bool:
        """The state of the budget: True if nothing more is parsed."""
        return self._left < 0

    def _parse(self, lines: Sequence[str]) -> list[ast.stmt] | int:
        """Return the statements, or the number of the first line (from 1) that does not parse."""
        text = "\n".join(lines)
        self._left -= len(text) + _CALL
        if self._left < 0:
            return 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(text).body
        except SyntaxError as error:
            line = error.lineno or 1
        except (ValueError, MemoryError, RecursionError):
            line = 1
        self._left -= 3 * len(text)  # CPython parses twice to report an error
        return line

    def parsed(self, lines: Sequence[str]) -> list[Statement] | None:
        nodes = self._parse(lines)
        return None if isinstance(nodes, int) else [statement_of(lines, node) for node in nodes]

    def longest_prefix(
        self, lines: Sequence[str], least: int = 0, *, inside: bool = False
    ) -> tuple[list[ast.stmt], int]:
        """Return the statements of as many lines as parse, and the number of those lines.

        Args:
            lines: the text.
            least: fewer lines than these are of no use.
            inside: a ``return`` outside a function ends the text, too.
        """
        end = len(lines)
        for _ in range(_PREFIXES):
            if end <= least:
                break
            nodes = self._parse(lines[:end])
            if isinstance(nodes, int):
                end = min(end - 1, nodes - 1)
                continue
            stray = next((n for n in nodes if inside and isinstance(n, ast.Return)), None)
            if stray is None:
                return nodes, end
            end = stray.lineno - 1
        return [], 0

    def islands(self, lines: Sequence[str]) -> tuple[list[Statement], frozenset[int]]:
        """Return the top-level statements among other lines, and the indices of those cut."""
        whole = self.parsed(lines)
        if whole is not None:
            return whole, frozenset()
        statements: list[Statement] = []
        cut = set()
        at = 0
        while at < len(lines) and self._left > 0:
            if not _STATEMENT.match(lines[at]):
                at += 1
                continue
            end = _chunk_end(lines, at)
            nodes = self._parse(lines[at:end])
            if isinstance(nodes, int):
                if end == at + 1 and not _OPEN.search(lines[at]):
                    at += 1
                    continue
                nodes, length = self.longest_prefix(lines[at : at + _LONGEST])
                end = at + max(length, 1)
                following = next((line for line in lines[end:] if line.strip()), "")
                if nodes and indentation(following):
                    cut.add(len(statements) + len(nodes) - 1)
            statements += [statement_of(lines[at:end], node) for node in nodes]
            at = end
        return statements, frozenset(cut)


def _chunk_end(lines: Sequence[str], at: int) -> int:
    """Return the index of the line after a statement, by indentation alone."""
    end = at
    limit = min(at + _LONGEST, len(lines))
    while end < limit and lines[end].startswith("@"):
        end += 1
    end += 1
    last = end
    while end < limit:
        line = lines[end]
        if line.strip():
            if not indentation(line) and not _CONTINUES.match(line):
                break
            last = end + 1
        end += 1
    return min(last, len(lines))
