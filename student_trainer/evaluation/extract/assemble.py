"""The program of an answer: the definition and what it needs of the rest."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Sequence

from student_trainer.evaluation.extract.prompt import Prompt
from student_trainer.evaluation.extract.statements import (
    Statement,
    always_kept,
    is_future,
    is_import,
)

_NAMES = frozenset(dir(builtins))


def assembled(
    prompt: Prompt,
    own: Sequence[Statement],
    others: Sequence[Sequence[Statement]],
) -> str:
    """Return the prompt's lines and the answer's statements that the entry point needs."""
    imported = {n for s in own if is_import(s.node) for n in s.binds}
    binding: dict[str, list[int]] = {}
    for index, statement in enumerate(own):
        for name in statement.binds:
            if isinstance(statement.node, ast.Expr) and name in imported:
                continue
            binding.setdefault(name, []).append(index)
    elsewhere: dict[str, list[Statement]] = {}
    for block in others:
        new = {name for s in block for name in s.binds} - elsewhere.keys()
        for statement in block:
            for name in statement.binds & new:
                elsewhere.setdefault(name, []).append(statement)
    kept: set[int] = {i for i, s in enumerate(own) if always_kept(s.node)}
    helpers: dict[int, Statement] = {}
    known = _NAMES | prompt.names | {prompt.entry_point}
    names = [prompt.entry_point, *(name for i in kept for name in own[i].uses)]
    seen: set[str] = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in binding:
            for index in binding[name]:
                if index not in kept:
                    kept.add(index)
                    names += own[index].uses
        elif name not in known:
            for statement in elsewhere.get(name, ()):
                if id(statement) not in helpers:
                    helpers[id(statement)] = statement
                    names += statement.uses
    order = [s for block in others for s in block if id(s) in helpers]
    parts = [*order, *(s for i, s in enumerate(own) if i in kept)]
    future = [s.source for s in parts if is_future(s.node)]
    code = [s.source for s in parts if not is_future(s.node)]
    return "\n".join([*future, prompt.preamble + "\n\n".join(code)]) + "\n"
