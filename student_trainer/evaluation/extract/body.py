"""The body of the prompt's function, as base models continue it."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from student_trainer.evaluation.extract.parser import Parser
from student_trainer.evaluation.extract.prompt import Prompt
from student_trainer.evaluation.extract.statements import (
    FUNCTIONS,
    SCOPES,
    Statement,
    acts,
    scope_of,
    statement_of,
)
from student_trainer.evaluation.extract.text import indentation


def body_of(lines: Sequence[str], task: Prompt, parser: Parser) -> tuple[Statement, ...] | None:
    """Return the prompt's function with these lines as its body and what follows, or None."""
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None or not task.continued:
        return None
    prompt = task.text.split("\n")
    partial = prompt.pop()  # "" after a newline
    least = len(prompt)
    space = indentation(lines[first])
    rest = lines[first:]
    if partial.strip():
        tries = [[partial + lines[0], *lines[1:]]]
        if space:
            prompt.append(partial)
            tries = [*tries, list(lines)] if first else [list(lines)]
            least += 1
    else:
        own = [line.removeprefix(space) for line in rest]
        moved = [task.indent + line if line.strip() else line for line in own]
        if space:  # lines with less indentation than the first are no part of the body
            moved = [
                new if old.startswith(space) else old for old, new in zip(rest, moved, strict=True)
            ]
        tries = [
            [partial + lines[0], *lines[1:]],
            [task.indent + rest[0].lstrip(), *rest[1:]],
            moved,
        ]
    best: tuple[int, tuple[Statement, ...]] | None = None
    for attempt in tries:
        whole = [*prompt, *attempt]
        nodes, end = parser.longest_prefix(whole, least, inside=True)
        found = _function_of(nodes, least, task.entry_point)
        if found is None or (best is not None and end <= best[0]):
            continue
        number, returns = found
        if returns or (space and attempt is tries[0]):
            kept = [
                n for n in nodes[number:] if n is nodes[number] or not _again(n, task.entry_point)
            ]
            best = end, tuple(statement_of(whole, node) for node in kept)
            if attempt is tries[0]:
                break
    return None if best is None else best[1]


def _function_of(nodes: Sequence[ast.stmt], least: int, name: str) -> tuple[int, bool] | None:
    """Return the index of the function that continues the prompt, and if it returns."""
    for number, node in enumerate(nodes):
        if not isinstance(node, FUNCTIONS) or node.name != name:
            continue
        if (node.end_lineno or 0) <= least or node.lineno > max(least, 1):
            continue
        added = [n for n in node.body if (n.end_lineno or 0) > least]
        returns = any(isinstance(n, (ast.Return, ast.Yield, ast.YieldFrom, ast.Raise))
                      for statement in added for n in scope_of(statement))  # fmt: skip
        nested = any(isinstance(n, FUNCTIONS) and n.name == name for n in added)
        if not returns and (nested or not any(map(acts, added))):
            return None
        return number, returns
    return None


def _again(node: ast.stmt, name: str) -> bool:
    return isinstance(node, SCOPES) and getattr(node, "name", None) == name
