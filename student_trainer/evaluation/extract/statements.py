"""The statements of a program: the names that each binds and uses, and what it is good for."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Statement:
    """A top-level statement: its source, names it binds or changes, names it needs."""

    node: ast.stmt
    source: str
    binds: frozenset[str]
    uses: frozenset[str]


def statement_of(lines: Sequence[str], node: ast.stmt) -> Statement:
    decorators = getattr(node, "decorator_list", [])
    first, end = min([node.lineno, *(d.lineno for d in decorators)]), node.end_lineno or node.lineno
    source = list(lines[first - 1 : end])
    source[-1] = source[-1].encode()[: node.end_col_offset].decode()
    if not decorators:
        source[0] = source[0].encode()[node.col_offset :].decode()
    try:
        uses = _free(node)
    except RecursionError:
        uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return Statement(node, "\n".join(source), frozenset(_bound(node)), frozenset(uses))


def defines(statement: Statement, name: str) -> bool:
    node = statement.node
    if isinstance(node, ast.Assign | ast.AnnAssign):
        # The result of a call of the function itself is no definition of it.
        value = node.value
        return (
            value is not None and not isinstance(value, ast.Constant) and name not in _free(value)
        )
    return not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.AugAssign | ast.For)


def is_stub(node: ast.stmt) -> bool:
    return isinstance(node, FUNCTIONS) and not any(
        (isinstance(n, ast.Raise) and "NotImplemented" not in ast.dump(n)) or acts(n)
        for n in node.body
    )


def acts(node: ast.stmt) -> bool:
    """Return whether a statement is more than a comment, a bare value or a declaration."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call | ast.Yield | ast.YieldFrom | ast.Await)
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    return not isinstance(node, ast.Pass | ast.Import | ast.ImportFrom | ast.Raise)


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def always_kept(node: ast.stmt) -> bool:
    """Return whether a statement is always kept: no name leads to it, but it affects the rest."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or any(alias.name == "*" for alias in node.names)
    return isinstance(node, ast.Expr) and ast.unparse(node)[:22] == "sys.setrecursionlimit("


def scope_of(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of one scope, without those of functions and classes in it."""
    todo = [node]
    while todo:
        current = todo.pop()
        yield current
        if not isinstance(current, SCOPES):
            todo += ast.iter_child_nodes(current)


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds or changes in its scope."""
    if isinstance(statement, ast.AnnAssign) and statement.value is None:
        return set()
    if isinstance(statement, ast.If) and "__name__" in _free(statement.test):
        return set()
    names = set()
    for node in scope_of(statement):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            names.add(_root(node))
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
        ):
            names.add(_root(node.value.func))
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names - {""}


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _free(node: ast.AST) -> set[str]:
    """Return the names that a node takes from around it."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, (*FUNCTIONS, ast.Lambda)):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        outside: list[ast.AST | None] = [*arguments.defaults, *arguments.kw_defaults]
        outside += [a.annotation for a in every]
        inner: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else [*node.body]
        local = {a.arg for a in every}
        shared: set[str] = set()
        if not isinstance(node, ast.Lambda):
            outside += [*node.decorator_list, node.returns]
            for statement in node.body:
                local |= _stored(statement)
            shared = {
                name
                for statement in node.body
                for n in scope_of(statement)
                if isinstance(n, ast.Global)
                for name in n.names
            }
        return _all_free(outside) | (_all_free(inner) - local) | shared
    if isinstance(node, _COMPREHENSIONS):
        local = {
            n.id
            for part in node.generators
            for n in ast.walk(part.target)
            if isinstance(n, ast.Name)
        }
        return _all_free(ast.iter_child_nodes(node)) - local
    return _all_free(ast.iter_child_nodes(node))


def _all_free(nodes: Iterable[ast.AST | None]) -> set[str]:
    return set[str]().union(*(_free(node) for node in nodes if node is not None))


def _stored(statement: ast.stmt) -> set[str]:
    """Return the names that a statement makes local to its function."""
    names = set()
    for node in scope_of(statement):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names
