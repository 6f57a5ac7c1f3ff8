"""Find the program in a completion by what parses, however it is wrapped.

A completion is one of three things, tried in this order:

1. The body of the prompt's function, as base models continue it.
2. A definition of the entry point, in a fence of any kind or without one.
3. A body in a fence, or indented in prose.

Of several definitions a complete one goes before one that is cut or empty. In fences the last one
counts, as the answer a chat model ends with; without fences the first one, as base models run on.
Of the rest of the answer only what the definition needs is kept: imports, helpers, constants.
Code that ends in the middle is taken up to the last line that parses. Nothing is renamed, and only
indentation and typography are repaired. Where no code is found the program says so and fails.

The time is bounded: `_BUDGET` characters are parsed for an answer, whatever it holds.
"""

from __future__ import annotations

import ast
import builtins
import html
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

_BUDGET = 800_000  # characters parsed for one answer
_CALL = 200  # what a call of the parser costs beside its characters
_PREFIXES = 100  # most prefixes of one text that are tried
_LONGEST = 2_000  # most lines of one statement among lines of prose
_MARKERS = 400  # most fence markers of one answer that are read
_VIEWS = 12  # most indented definitions or inline codes of one segment

_MARKER = re.compile(
    r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<tag>[\w+#.:-]*)(?P<rest>[^\n]*)$"
)
_PREFIX = re.compile(r"^[\s>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?[\s>]*$")
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_CODE_LINE = re.compile(r"[ \t]*(?:def|async|class|import|from|return|@)\b|[ \t]*\w+[ \t]*=[^=]")
_STATEMENT = re.compile(
    r"(?:async|def|class|import|from|if|for|while|with)\s|try\s*:|@"
    r"|[A-Za-z_][\w.\[\]'\", ]{0,200}(?::[^=\n]{1,200})?[-+*/|&]?=(?!=)|\w+\.[\w.]{1,200}\("
)
_OPEN = re.compile(r"[(\[{\\]|\"\"\"|'''")
_CONTINUES = re.compile(r"[)\]}]|(?:else|elif|except|finally)\b")
_HEADER = re.compile(r"[ \t]*(?:class|def|async|if|elif|else|for|while|with|try|except)\b.*:")
_BLOCK = re.compile(r"(?:class|def|async|if|elif|else|for|while|with|try|except|@)(?!\w)")
_REPL = re.compile(r"[ \t]*(?:>>>|\.\.\.|In \[\d+\]:|\.\.\.:)(?: |$)")
_THOUGHTS = (
    *(
        (rf"<{name}>", rf"</{name}>")
        for name in ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
    ),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel\|>analysis<\|message\|>", r"<\|channel\|>final<\|message\|>"),
    (r"\Aanalysis(?=[A-Z\s])", r"assistantfinal"),
)
_UNQUOTED = r"(?<![\"'`]){}(?![\"'`])"  # a tag in quotes is mentioned, not meant
_END = re.compile(
    _UNQUOTED.format(r"(?:<\|(?:endoftext|im_end|eot_id|end_of_text|end)\|>|<end_of_turn>)")
)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TYPOGRAPHY = {
    **dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad\x00"), None),
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2009\u202f\u3000"), " "),
    **dict.fromkeys(map(ord, "“”„‟″"), '"'),
    **dict.fromkeys(map(ord, "‘’‚‛′"), "'"),
}
_TAGS = re.compile(
    r"^[ \t]*(?:</?(?:pre|code|answer|solution|python)\b[^>\n]{0,80}>|\[/?PYTHON\])+"
    r"|(?:</(?:pre|code|answer|solution|python)>|\[/PYTHON\])+[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|#39|#x27);")
_NAMES = frozenset(dir(builtins))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class _Statement:
    """A top-level statement: its source, names it binds or changes, names it needs."""

    node: ast.stmt
    source: str
    binds: frozenset[str]
    uses: frozenset[str]


@dataclass(frozen=True)
class _Segment:
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


@dataclass(frozen=True)
class _Definition:
    """The statements of a segment that define the entry point."""

    statements: tuple[_Statement, ...]
    stub: bool
    complete: bool
    fenced: bool
    closed: bool
    at: int


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
    reader = _Reader(_normalized(prompt), entry_point)
    text = after_thoughts(_normalized(completion), truncated)
    if _ENTITY.search(text) and "<" not in text and ">" not in text:
        text = html.unescape(text)
    variants = [text]
    for changed in (text.translate(_TYPOGRAPHY), _TAGS.sub("\n```\n", text)):
        if changed not in variants:
            variants.append(changed)
    found = None
    for variant in variants:
        code, complete = reader.solve(variant)
        if code is not None and (found is None or complete):
            found = code
        if complete:
            break
    missing = f"the answer has no definition of {entry_point}"
    return f"raise NameError({missing!r})\n" if found is None else found


def _normalized(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    text = _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return text.lstrip("\ufeff")


def after_thoughts(text: str, truncated: bool) -> str:
    """Return the text after the thoughts and before a model's end token."""
    for opening, closing in _THOUGHTS:
        ends = [m.end() for m in re.finditer(_UNQUOTED.format(closing), text)]
        if ends:
            text = text[ends[-1] :]
        opened = re.search(_UNQUOTED.format(f"(?:{opening})"), text)
        if opened and truncated:
            text = text[: opened.start()]
        elif opened:
            # The model ended by itself without the closing tag.
            text = text[: opened.start()] + "\n" + text[opened.end() :]
    end = _END.search(text)
    return text[: end.start()] if end else text


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


class _Reader:
    """A parser of one answer, within a budget."""

    def __init__(self, prompt: str, entry_point: str) -> None:
        self._left = _BUDGET
        self._entry = entry_point
        self._prompt = prompt
        name = re.escape(entry_point)
        self._named = re.compile(rf"(?<!\w){name}(?!\w)")
        self._header = re.compile(
            rf"^([ \t]*)(?:(?:async[ \t]+)?def[ \t]+{name}|class[ \t]+{name}|{name}[ \t]*[:=])"
            r"(?!\w)",
            re.MULTILINE,
        )
        self._preamble, self._indent, self._continued = self._read_prompt()
        self._preamble_names = frozenset[str]().union(
            *(s.binds for s in self._parsed(self._preamble.split("\n")) or [])
        )

    # Parsing

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

    def _parsed(self, lines: Sequence[str]) -> list[_Statement] | None:
        nodes = self._parse(lines)
        return None if isinstance(nodes, int) else [_statement(lines, node) for node in nodes]

    def _longest_prefix(
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

    def _islands(self, lines: Sequence[str]) -> tuple[list[_Statement], frozenset[int]]:
        """Return the top-level statements among other lines, and the indices of those cut."""
        whole = self._parsed(lines)
        if whole is not None:
            return whole, frozenset()
        statements: list[_Statement] = []
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
                nodes, length = self._longest_prefix(lines[at : at + _LONGEST])
                end = at + max(length, 1)
                following = next((line for line in lines[end:] if line.strip()), "")
                if nodes and _indentation(following):
                    cut.add(len(statements) + len(nodes) - 1)
            statements += [_statement(lines[at:end], node) for node in nodes]
            at = end
        return statements, frozenset(cut)

    # The prompt

    def _read_prompt(self) -> tuple[str, str, bool]:
        """Return the lines before the function, its indentation, and if the prompt is code."""
        lines = self._prompt.rstrip().split("\n")
        found = [m for m in self._header.finditer(self._prompt) if not m[1]]
        if not found:
            whole = self._parsed(lines)
            return ("" if whole is None else self._prompt), "    ", False
        number = self._prompt.count("\n", 0, found[-1].start())
        while number and lines[number - 1].startswith("@"):
            number -= 1
        before = self._prompt.split("\n")[:number]
        if self._parsed(before) is None:
            statements, _ = self._islands(before)
            before = [s.source for s in statements if s.binds]
        body = _indentation(lines[-1]) if len(lines) > number + 1 else ""
        for line in lines[number + 1 :]:
            if line.lstrip().startswith(('"""', "'''", 'r"""')):
                body = _indentation(line)
                break
        return "".join(line + "\n" for line in before), body or "    ", True

    # Choosing

    def solve(self, text: str) -> tuple[str | None, bool]:
        """Return the program, and whether nothing of it was cut."""
        segments = _segments(text)
        first = segments[0]
        if not first.fenced:
            body = self._body(first.lines)
            if body is not None:
                return self._assembled(body, []), True
        definitions: list[_Definition] = []
        pool: list[list[_Statement]] = []
        for at, segment in enumerate(segments):
            statements, definition = self._definition(segments, at, segment)
            pool.append(statements)
            if definition is not None:
                definitions.append(definition)
        chosen = _chosen([d for d in definitions if not d.stub])
        if chosen is not None:
            others = [*pool[: chosen.at], *pool[chosen.at + 1 :]]
            code = self._assembled(chosen.statements, others)
            return code, chosen.complete and chosen.closed
        for segment in [s for s in segments if s.fenced] + [
            replace(s, lines=tuple(run)) for s in segments if not s.fenced for run in _runs(s.lines)
        ]:
            body = self._body(segment.lines)
            if body is not None:
                return self._assembled(body, pool), segment.closed
        stub = _chosen(definitions)
        return (None if stub is None else self._assembled(stub.statements, pool)), False

    def _definition(
        self, segments: Sequence[_Segment], at: int, segment: _Segment
    ) -> tuple[list[_Statement], _Definition | None]:
        """Return all statements of a segment, and its definition of the entry point."""
        text = "\n".join(segment.lines)
        statements, cut = self._islands(_dedented(segment.lines))
        found = self._as_definition(statements, cut, segment, at)
        if (found and found.complete) or not self._named.search(text):
            return statements, found
        for view in self._views(segment, text):
            other = self._as_definition(*self._islands(view), segment, at)
            if other is not None and (found is None or other.complete):
                found = other
                break
        if (found is None or not found.complete) and self._header.search(text):
            for width in (3, 5):  # rejoin what fences in a docstring or in a longer fence split
                joined = segments[at : at + width]
                if len(joined) == width:
                    lines = [line for part in joined for line in part.raw][:-1]
                    other = self._as_definition(*self._islands(_dedented(lines)), segment, at)
                    if other is not None and other.complete:
                        return list(other.statements), other
        return statements, found

    def _views(self, segment: _Segment, text: str) -> Iterator[Sequence[str]]:
        """Yield other readings of a segment: a session, an indented definition, inline code."""
        lines = segment.lines
        if any(_REPL.match(line) for line in lines):
            yield [_REPL.sub("", line, count=1) for line in lines if _REPL.match(line)]
        indented = [m for m in self._header.finditer(text) if m[1]]
        for match in indented[:_VIEWS]:
            if self._left < 0:
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
        self, statements: Sequence[_Statement], cut: frozenset[int], segment: _Segment, at: int
    ) -> _Definition | None:
        defining = [
            i
            for i, s in enumerate(statements)
            if self._entry in s.binds and _defines(s, self._entry)
        ]
        if not defining:
            return None
        ranked = [(not _is_stub(statements[i].node), i not in cut) for i in defining]
        best = max(ranked)
        good = [i for i, rank in zip(defining, ranked, strict=True) if rank == best]
        # A name bound twice in a fence has its last meaning, as in Python.
        kept = set(good if segment.fenced else good[:1])
        kept.update(i for i in defining if not isinstance(statements[i].node, _SCOPES))
        own = tuple(s for i, s in enumerate(statements) if i not in defining or i in kept)
        return _Definition(own, not best[0], best[1], segment.fenced, segment.closed, at)

    def _body(self, lines: Sequence[str]) -> tuple[_Statement, ...] | None:
        """Return the prompt's function with these lines as its body and what follows, or None."""
        first = next((i for i, line in enumerate(lines) if line.strip()), None)
        if first is None or not self._continued:
            return None
        prompt = self._prompt.split("\n")
        partial = prompt.pop()  # "" after a newline
        least = len(prompt)
        space = _indentation(lines[first])
        rest = lines[first:]
        if partial.strip():
            tries = [[partial + lines[0], *lines[1:]]]
            if space:
                prompt.append(partial)
                tries = [*tries, list(lines)] if first else [list(lines)]
                least += 1
        else:
            own = [line.removeprefix(space) for line in rest]
            moved = [self._indent + line if line.strip() else line for line in own]
            if space:  # lines with less indentation than the first are no part of the body
                moved = [
                    new if old.startswith(space) else old
                    for old, new in zip(rest, moved, strict=True)
                ]
            tries = [
                [partial + lines[0], *lines[1:]],
                [self._indent + rest[0].lstrip(), *rest[1:]],
                moved,
            ]
        best: tuple[int, tuple[_Statement, ...]] | None = None
        for attempt in tries:
            whole = [*prompt, *attempt]
            nodes, end = self._longest_prefix(whole, least, inside=True)
            found = self._function_of(nodes, least)
            if found is None or (best is not None and end <= best[0]):
                continue
            number, returns = found
            if returns or (space and attempt is tries[0]):
                kept = [n for n in nodes[number:] if n is nodes[number] or not self._again(n)]
                best = end, tuple(_statement(whole, node) for node in kept)
                if attempt is tries[0]:
                    break
        return None if best is None else best[1]

    def _function_of(self, nodes: Sequence[ast.stmt], least: int) -> tuple[int, bool] | None:
        """Return the index of the function that continues the prompt, and if it returns."""
        for number, node in enumerate(nodes):
            if not isinstance(node, _FUNCTIONS) or node.name != self._entry:
                continue
            if (node.end_lineno or 0) <= least or node.lineno > max(least, 1):
                continue
            added = [n for n in node.body if (n.end_lineno or 0) > least]
            returns = any(isinstance(n, (ast.Return, ast.Yield, ast.YieldFrom, ast.Raise))
                          for statement in added for n in _scope(statement))  # fmt: skip
            nested = any(isinstance(n, _FUNCTIONS) and n.name == self._entry for n in added)
            if not returns and (nested or not any(map(_acts, added))):
                return None
            return number, returns
        return None

    def _again(self, node: ast.stmt) -> bool:
        return isinstance(node, _SCOPES) and getattr(node, "name", None) == self._entry

    # Putting together

    def _assembled(
        self,
        own: Sequence[_Statement],
        others: Sequence[Sequence[_Statement]],
    ) -> str:
        """Return the prompt's lines and the answer's statements that the entry point needs."""
        imported = {n for s in own if _is_import(s.node) for n in s.binds}
        binding: dict[str, list[int]] = {}
        for index, statement in enumerate(own):
            for name in statement.binds:
                if isinstance(statement.node, ast.Expr) and name in imported:
                    continue
                binding.setdefault(name, []).append(index)
        elsewhere: dict[str, list[_Statement]] = {}
        for block in others:
            new = {name for s in block for name in s.binds} - elsewhere.keys()
            for statement in block:
                for name in statement.binds & new:
                    elsewhere.setdefault(name, []).append(statement)
        kept: set[int] = {i for i, s in enumerate(own) if _always(s.node)}
        helpers: dict[int, _Statement] = {}
        known = _NAMES | self._preamble_names | {self._entry}
        names = [self._entry, *(name for i in kept for name in own[i].uses)]
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
        future = [s.source for s in parts if _is_future(s.node)]
        code = [s.source for s in parts if not _is_future(s.node)]
        return "\n".join([*future, self._preamble + "\n\n".join(code)]) + "\n"


def _segments(text: str) -> list[_Segment]:
    """Split a text at its fence markers, paired as Markdown does."""
    segments: list[_Segment] = []
    lines: list[str] = []
    opener: str | None = None
    prefix, markers = "", 0

    def close(marker: str | None) -> None:
        if segments or any(line.strip() for line in lines) or opener is None:
            stripped = tuple(_without_prefix(line, prefix) for line in lines)
            raw = (*lines, marker or "")
            closed = marker is not None or opener is None
            segments.append(_Segment(stripped, raw, opener is not None, closed))
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
    return segments or [_Segment((), (), False, True)]


def _dedented(lines: Sequence[str]) -> list[str]:
    """Return the lines without the indentation they share; strings keep their blank lines."""
    shared = os.path.commonprefix([_indentation(line) for line in lines if line.strip()])  # noqa: RUF071
    return [line.removeprefix(shared) for line in lines]


def _without_prefix(line: str, prefix: str) -> str:
    if ">" in prefix:
        return re.sub(r"^[ \t]*(?:> ?){1,8}", "", line)
    space = _indentation(prefix)
    return line.removeprefix(space)


def _runs(lines: Sequence[str]) -> list[list[str]]:
    """Return a few runs of indented lines between prose, without those below a code header."""
    runs: list[list[str]] = [[]]
    header = False
    for line in lines:
        if line.strip() and not _indentation(line):
            runs.append([])
            header = _BLOCK.match(line) is not None
        elif not header and (line.strip() or runs[-1]):
            runs[-1].append(line)
    return [run for run in runs if run][:_VIEWS]


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
            if not _indentation(line) and not _CONTINUES.match(line):
                break
            last = end + 1
        end += 1
    return min(last, len(lines))


def _chosen(definitions: Sequence[_Definition]) -> _Definition | None:
    if not definitions:
        return None
    best = max((d.complete, d.closed) for d in definitions)
    good = [d for d in definitions if (d.complete, d.closed) == best]
    fenced = [d for d in good if d.fenced]
    return fenced[-1] if fenced else good[0]


def _statement(lines: Sequence[str], node: ast.stmt) -> _Statement:
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
    return _Statement(node, "\n".join(source), frozenset(_bound(node)), frozenset(uses))


def _defines(statement: _Statement, name: str) -> bool:
    node = statement.node
    if isinstance(node, ast.Assign | ast.AnnAssign):
        # The result of a call of the function itself is no definition of it.
        value = node.value
        return (
            value is not None and not isinstance(value, ast.Constant) and name not in _free(value)
        )
    return not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.AugAssign | ast.For)


def _is_stub(node: ast.stmt) -> bool:
    return isinstance(node, _FUNCTIONS) and not any(
        (isinstance(n, ast.Raise) and "NotImplemented" not in ast.dump(n)) or _acts(n)
        for n in node.body
    )


def _acts(node: ast.stmt) -> bool:
    """Return whether a statement is more than a comment, a bare value or a declaration."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call | ast.Yield | ast.YieldFrom | ast.Await)
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    return not isinstance(node, ast.Pass | ast.Import | ast.ImportFrom | ast.Raise)


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _always(node: ast.stmt) -> bool:
    """Return whether a statement is always kept: no name leads to it, but it affects the rest."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or any(alias.name == "*" for alias in node.names)
    return isinstance(node, ast.Expr) and ast.unparse(node)[:22] == "sys.setrecursionlimit("


def _scope(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of one scope, without those of functions and classes in it."""
    todo = [node]
    while todo:
        current = todo.pop()
        yield current
        if not isinstance(current, _SCOPES):
            todo += ast.iter_child_nodes(current)


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds or changes in its scope."""
    if isinstance(statement, ast.AnnAssign) and statement.value is None:
        return set()
    if isinstance(statement, ast.If) and "__name__" in _free(statement.test):
        return set()
    names = set()
    for node in _scope(statement):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
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
    if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
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
                for n in _scope(statement)
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
    for node in _scope(statement):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names
