"""Parse command lines so that a mistake is told in one line, with the name that was meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from shared.compat import parser_actions
from shared.errors import ConfigurationError
from shared.nearest import nearest

_ARGUMENT = re.compile(r"^argument ([^\s/:]+)(?:/[^\s:]+)*: ")
_MOST_SUGGESTED = 3
_NO_HABITS: Mapping[str, Sequence[str]] = MappingProxyType({})


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, raised as `ConfigurationError`.

    Flags are never abbreviated, because a later version may have a second one that begins so.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message, without the usage and with one name of the flag."""
        required = message.removeprefix("the following arguments are required: ")
        if required != message:
            message = f"{required} is missing; see `{self.prog} --help`"
        raise ConfigurationError(_ARGUMENT.sub(r"\1: ", message))

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse arguments, all of which must be known.

        Raises:
            ConfigurationError: an unknown flag, with the nearest known one, or a wrong value.
        """
        unknown = unknown_flags(self, argv)
        if not unknown:
            parsed, unknown = self.parse_known_args(list(argv))
        if unknown:
            name = unknown[0].split("=")[0]
            hint = did_you_mean(name, long_flags(self)) or f" See `{self.prog} --help`"
            raise ConfigurationError(f"unknown argument {name!r}.{hint}")
        return parsed


def long_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long names of a parser's flags, with their dashes."""
    return [
        name
        for action in parser_actions(parser)
        for name in action.option_strings
        if name.startswith("--")
    ]


def unknown_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Return the long flags that a parser does not have, as they were typed.

    argparse tells of them only once every required argument is there.
    """
    known = set(long_flags(parser))
    flags = argv[: argv.index("--")] if "--" in argv else argv
    return [
        flag
        for flag in flags
        if flag.startswith("--") and " " not in flag and flag.split("=")[0] not in known
    ]


def did_you_mean(
    name: str, known: Collection[str], habits: Mapping[str, Sequence[str]] = _NO_HABITS
) -> str:
    """Return " Did you mean …?" for an unknown name, or an empty text.

    Args:
        name: as it was typed; the names are compared without dashes, and ``-`` is ``_``.
        known: as they shall be written.
        habits: names that other programs have, with what may stand for them here.
    """
    likely = likely_names(name, known, habits)
    if not likely:
        return ""
    *others, last = likely
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def likely_names(
    name: str, known: Collection[str], habits: Mapping[str, Sequence[str]] = _NO_HABITS
) -> list[str]:
    """Return the known names that an unknown one may stand for: a few at most, as in ``known``."""
    by_plain: dict[str, str] = {}
    for each in known:
        by_plain.setdefault(_plain(each), each)
    plain = _plain(name)
    habitual = [by_plain[each] for each in habits.get(plain, ()) if each in by_plain]
    if plain in by_plain or habitual:
        return [by_plain[plain]] if plain in by_plain else habitual[:1]
    longer = [] if len(plain) < 2 else [each for each in by_plain if each.startswith(plain)]
    if 0 < len(longer) <= _MOST_SUGGESTED:
        return [by_plain[each] for each in longer]
    near = nearest(plain, by_plain)
    return [] if near is None else [by_plain[near]]


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
