"""The page of the modules that others import, from their docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from markdown_text import escaped

MODULES = (
    "student_trainer",
    "student_trainer.losses",
    "student_trainer.teacher.base",
    "student_trainer.teacher.sparse_gkd",
    "student_trainer.teacher.cache",
    "student_trainer.teacher.vllm",
    "student_trainer.rollouts",
    "student_trainer.training.trainer",
    "student_trainer.training.nonfinite",
    "student_trainer.evaluation.checkers",
    "student_trainer.evaluation.passk",
    "student_trainer.evaluation.sandbox",
    "shared.protocol",
    "shared.sparse",
    "shared.wire",
    "shared.codec",
    "shared.identity",
    "shared.errors",
    "teacher_server.backends.base",
)

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|Examples):$")


def page() -> str:
    """Return the page: every module with its public functions and classes."""
    lines = ["# Python", "", "Public modules, from their docstrings."]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += ["", f"## `{name}`", "", *docstring(module.__doc__)]
        for public, value in _public(module):
            lines += _documented(f"{name}.{public}", public, value)
    return "\n".join(lines) + "\n"


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of those in ``__all__``, or else of the module's own, in their order."""
    defined = [name for name, value in vars(module).items() if _owns(module, name, value)]
    for name in getattr(module, "__all__", defined):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value


def _owns(module: ModuleType, name: str, value: Any) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__


def _documented(path: str, name: str, value: Any) -> list[str]:
    lines = ["", f"### `{name}` {{#{path}}}", ""]
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        lines += ["```python", _signature(name, value), "```", ""]
    lines += docstring(value.__doc__ if inspect.isclass(value) else inspect.getdoc(value))
    if inspect.isclass(value):
        for method, of_class in vars(value).items():
            function = getattr(of_class, "__func__", of_class)
            if method.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                continue
            lines += ["", f"#### `{name}.{method}`", "", "```python"]
            lines += [_signature(method, function), "```", "", *docstring(function.__doc__)]
    return lines


def _signature(name: str, value: Any) -> str:
    """Return a signature as Python code, an argument a line where one line would be too long."""
    signature = inspect.signature(value)
    kind = "def"
    if inspect.isclass(value):
        kind, signature = "class", signature.replace(return_annotation=signature.empty)
    line = f"{kind} {name}{signature}".replace("'", "")
    if len(line) <= 88:
        return line
    arguments: list[str] = []
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            arguments.append("*")
        arguments.append(str(parameter).replace("'", ""))
    inside = "".join(f"    {argument},\n" for argument in arguments)
    returned = signature.return_annotation
    arrow = "" if returned is signature.empty else f" -> {returned}"
    return f"{kind} {name}(\n{inside}){arrow}"


def docstring(text: str | None) -> list[str]:
    """Return a docstring as lines of Markdown: sections become lists, drawings stay."""
    lines: list[str] = []
    section = False
    for paragraph in re.split(r"\n\n+", inspect.cleandoc(text or "")):
        first, _, rest = paragraph.partition("\n")
        section = bool(_SECTION.match(first))
        if section:
            lines += [f"**{first}**", ""]
            for entry in re.split(r"\n(?=    \S)", "\n" + rest)[1:]:
                name, colon, text = " ".join(entry.split()).partition(": ")
                lines.append(f"- `{name}`: {escaped(text)}" if colon else f"- {escaped(name)}")
        elif "├──" in paragraph:
            lines += ["```text", paragraph, "```"]
        elif paragraph.startswith("    "):
            lines += ["```text", inspect.cleandoc("\n" + paragraph), "```"]
        else:
            lines.append(escaped(paragraph))
        lines.append("")
    return lines
