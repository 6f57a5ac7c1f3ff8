"""Name keywords of the Python functions in errors, where the commands name flags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from shared.errors import ProtocolError, SparseGKDError
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import Flag, flags_of

_NONE: Mapping[str, Any] = MappingProxyType({})
# A command in backquotes stays; a flag may have one value.
_FLAG = re.compile(r"`[^`]*`|(?<![\w-])--(?P<name>[a-z]\w*)(?: (?P<value>'[^']*'|[^\s:;,]+))?")
_NUMBER = re.compile(r"-?\d[\d.]*(e-?\d+)?|True|False|'.*'")


@contextmanager
def keywords_in_errors(
    parameters: Mapping[str, str] = _NONE, values: Mapping[str, Any] = _NONE
) -> Iterator[None]:
    """Write ``name=`` for ``--name`` in the errors that leave the block, or the function decorated.

    Args:
        parameters: keywords that have another name than their flag.
        values: what the caller gave, by flag.

    Raises:
        SparseGKDError: the same error, with another text.
    """
    try:
        yield
    except SparseGKDError as error:
        error.args = tuple(
            in_keywords(text, parameters, values) if isinstance(text, str) else text
            for text in error.args
        )
        if isinstance(error, ProtocolError):
            error.detail = in_keywords(error.detail, parameters, values)
        raise


def in_keywords(
    message: str, parameters: Mapping[str, str] = _NONE, values: Mapping[str, Any] = _NONE
) -> str:
    """Return a message with keywords in the place of flags: ``--beta 2.0`` is ``beta=2.0``."""
    flags = {
        name: one for types in ARGUMENTS.values() for kind in types for name, one in
        flags_of(kind).items()
    }  # fmt: skip

    def written(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"] or ""
        if name is None or (name not in flags and name not in parameters):
            return found[0]
        keyword = parameters.get(name, name)
        rest = found[0].removeprefix(f"--{name}")
        flag = flags.get(name)
        if flag is not None and flag.kind == "bool" and value in ("true", "false"):
            return f"{keyword}={value.capitalize()}"
        if _is_value(value, flag, values.get(name)):
            quoted = repr(value) if not _NUMBER.fullmatch(value) else value
            return f"{keyword}={quoted}"
        if flag is not None and flag.kind == "bool":
            return f"{keyword}=True{rest}"
        return f"{keyword}={rest}"

    return _FLAG.sub(written, message)


def _is_value(text: str, flag: Flag | None, given: Any) -> bool:
    """Return whether the text after a flag is its value, and no word of the message."""
    return bool(text) and (
        _NUMBER.fullmatch(text) is not None
        or (flag is not None and text in (*flag.choices, "true", "auto"))
        or (given is not None and text == str(given))
    )
