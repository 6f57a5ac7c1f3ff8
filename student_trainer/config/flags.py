"""Flags as data: fields of dataclasses declare them; text, YAML or Python give their values.

Nothing here imports torch or transformers, so that wrong flags are answered at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

Kind = Literal["bool", "int", "float", "str"]
# How a flag may differ when a checkpoint is resumed: it must be the "same", a change is logged
# ("told"), or it is "free" to change because it does not affect what is learned.
Resume = Literal["same", "told", "free"]

_TRUE = ("true", "yes", "on", "t", "y", "1")
_FALSE = ("false", "no", "off", "f", "n", "0")
_NUMBERS: dict[str, type[int] | type[float]] = {"int": int, "float": float}


def flag(
    default: Any,
    help: str,
    *,
    group: str | None,
    common: bool = False,
    resume: Resume = "free",
    private: bool = False,
    needs: tuple[str, Any] | None = None,
    aliases: tuple[str, ...] = (),
    extends: bool = False,
) -> Any:
    """Declare a dataclass field that is a flag of the command line.

    Args:
        group: title under which ``--help_all`` lists it; None: with transformers' own.
        common: whether ``--help`` lists it, and README.md: it matters to most runs.
        resume: see `Resume`.
        private: a model card leaves it out: an address, a key, or a setting of this machine.
        needs: (name, value) of the flag without which this one has no effect.
        aliases: other names, such as ``--dtype``.
        extends: the flag may be repeated; each time adds to the list.
    """
    metadata = {
        "help": help, "group": group, "common": common, "resume": resume, "private": private,
        "needs": needs, "aliases": aliases, "extends": extends,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """A flag: its name, how its value is read, and what ``--help`` says of it.

    Attributes:
        several: whether it takes one value or more.
        switch: whether its text may be left out, as a bool's may; it is True then.
        group, common, needs, extends: as in `flag`.
    """

    name: str
    kind: Kind
    default: Any = None
    help: str = ""
    choices: tuple[str, ...] = ()
    several: bool = False
    switch: bool = False
    aliases: tuple[str, ...] = ()
    group: str | None = None
    common: bool = False
    needs: tuple[str, Any] | None = None
    extends: bool = False

    def read(self, value: Any) -> Any:
        """Convert a value of YAML or of a Python keyword as the command line would its text.

        Raises:
            ValueError: it is of another type, or none of the choices.
        """
        if value is None:
            return None
        if isinstance(value, list | tuple):
            if not self.several:
                raise ValueError(f"expected one value, got {value!r}")
            return [self._one(item) for item in value]
        return [self._one(value)] if self.several else self._one(value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, Enum):
            value = value.value
        if self.kind == "bool":
            return value if isinstance(value, bool) else read_bool(str(value))
        if self.switch and isinstance(value, bool):
            return value
        if isinstance(value, bool):  # a choice such as no or on, as Python spells it
            spelt = [text for text in (_TRUE if value else _FALSE) if text in self.choices]
            value = spelt[0] if spelt else value
        if isinstance(value, bool) and self.kind != "str":
            raise ValueError(f"invalid {self.kind} value: {value!r}")
        if self.kind in _NUMBERS:
            try:
                return _NUMBERS[self.kind](str(value))
            except ValueError as error:
                raise ValueError(f"invalid {self.kind} value: {value!r}") from error
        text = _text(value)
        if text.lower() in self.choices:
            return text.lower()
        if self.choices and text not in self.choices:
            options = ", ".join(map(repr, self.choices))
            raise ValueError(f"invalid choice: {text!r} (choose from {options})")
        return text

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add this flag to a parser, also under its name with dashes instead of underscores."""
        names = [f"--{self.name}"]
        if "_" in self.name:
            names.append(f"--{self.name.replace('_', '-')}")
        options: dict[str, Any] = {"default": self.default, "help": self.help, "dest": self.name}
        names += self.aliases
        if self.kind == "bool":
            parser.add_argument(*names, type=_argument_bool, nargs="?", const=True, **options)
            if self.default is True:
                twins = [f"--no_{self.name}", f"--no-{self.name.replace('_', '-')}"]
                options.pop("help")
                parser.add_argument(*twins, action="store_false", **options)
            return
        if self.several:
            options["nargs"] = "+"
        if self.switch:
            options |= {"nargs": "?", "const": True}
        if self.extends:
            options["action"] = "extend"
        if self.choices:
            options["choices"] = self.choices
        parser.add_argument(*names, type=_NUMBERS.get(self.kind, str), **options)


def read_bool(text: str) -> bool:
    """Read a switch, in any case: true, yes, on, t, y, 1, or false, no, off, f, n, 0.

    Raises:
        ValueError: it is another text.
    """
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"invalid value: {text!r} (choose from true, false)")


def _argument_bool(text: str) -> bool:
    try:
        return read_bool(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _text(value: Any) -> str:
    """Return a value as the command line spells it: JSON for a mapping, a dtype's short name."""
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removeprefix("torch.")


def flags_of(kind: Any) -> dict[str, Flag]:
    """Return the flags that a dataclass declares or inherits, by name."""
    return _flags_of(kind)


@cache
def _flags_of(kind: Any) -> dict[str, Flag]:
    types = get_type_hints(kind)
    found = {}
    for one in fields(kind):
        if one.init:
            found[one.name] = one.metadata.get("flag") or _flag_of(one, types[one.name])
    return found


def _flag_of(declared: Field[Any], annotation: Any) -> Flag:
    """Make a flag of a field; ``X | None`` is X, and ``list[X]`` several of X."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if NoneType in get_args(annotation):
        (annotation,) = parts
    several = get_origin(annotation) is list
    if several:
        (annotation,) = get_args(annotation)
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    default = declared.default
    if declared.default_factory is not MISSING:
        default = declared.default_factory()
    metadata = declared.metadata
    return Flag(
        name=declared.name,
        kind="str" if choices else annotation.__name__,
        default=default,
        help=metadata["help"],
        choices=choices,
        several=several,
        aliases=metadata["aliases"],
        group=metadata["group"],
        common=metadata["common"],
        needs=metadata["needs"],
        extends=metadata["extends"],
    )


def marked(kinds: Sequence[Any], key: str, value: Any) -> set[str]:
    """Return the names of flags declared with ``key=value``, such as ``resume="same"``."""
    return {one.name for kind in kinds for one in fields(kind) if one.metadata.get(key) == value}
