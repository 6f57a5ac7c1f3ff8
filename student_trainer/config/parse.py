"""The parser of flags, YAML and Python keywords into the dataclasses of `config.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from shared.command_line import OneLineParser, did_you_mean, unknown_flags
from shared.errors import ConfigurationError
from shared.yaml_file import config_path, line_of, read_config
from student_trainer.config.commands import ARGUMENTS, COMMANDS
from student_trainer.config.flags import Flag, flags_of
from student_trainer.config.habits import HABITS
from student_trainer.config.help import add_help


def make_parser(*types: type[Any], prog: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a command, with all flags of its dataclasses."""
    parser = OneLineParser(
        prog=prog,
        description=description,
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command = COMMANDS.get(prog.removeprefix("student-trainer "))
    parser.epilog = command.example if command else ""
    flags = _flags(types)
    for one in flags.values():
        one.add_to(parser)
    parser.add_argument("--config", metavar="YAML", help="File with the same names as the flags.")
    add_help(parser, flags)
    return parser


def parse(argv: Sequence[str], *types: type[Any], prog: str, description: str) -> tuple[Any, ...]:
    """Read ``--config`` YAML and the command line, which wins, into instances of ``types``.

    Raises:
        ConfigurationError: unknown flag or key (with the nearest known one), unreadable YAML, or a
            value that is of the wrong type or that a dataclass refuses.
        SystemExit: --help.
    """
    parser, known = make_parser(*types, prog=prog, description=description), _flags(types)
    values: dict[str, Any] = {}
    path = config_path(argv)
    if path is not None:
        values = _from_yaml(path, known, argv)
    unknown = unknown_flags(parser, argv)
    if not unknown:
        # argparse fills in its defaults only where the namespace has no value yet.
        namespace, unknown = parser.parse_known_args(list(argv), argparse.Namespace(**values))
    if unknown:
        name = unknown[0].split("=")[0]
        raise ConfigurationError(f"unknown argument {name!r}.{_hint(name, known, prog)}")
    return _instances(types, vars(namespace))


def parse_keywords(command: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what `parse` returns for a command, from keywords with the names of its flags.

    Raises:
        ConfigurationError: as `parse`, and for a value of the wrong type.
    """
    types = ARGUMENTS[command]
    found = _read_all(values, _flags(types), lambda key: f"{command}()", what="keyword")
    return _instances(types, found)


def _instances(types: Sequence[type[Any]], values: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        return tuple(
            kind(**{f.name: values[f.name] for f in fields(kind) if f.init and f.name in values})
            for kind in types
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _flags(types: Sequence[type[Any]]) -> dict[str, Flag]:
    return {name: one for kind in types for name, one in flags_of(kind).items()}


def _hint(name: str, known: Mapping[str, Flag], prog: str) -> str:
    """Return what to do about an unknown argument."""
    if not name.startswith("-"):
        return f" Each value follows its flag; see {prog} --help."
    plain = name.lstrip("-").replace("-", "_")
    others = [f"`{command}`" for command, types in ARGUMENTS.items() if plain in _flags(types)]
    if others:
        return f" It is a flag of {', '.join(others)}, not of `{prog.split()[-1]}`."
    flags = [f"--{each}" for each in known]
    return did_you_mean(name, flags, HABITS) or f" See {prog} --help_all."


def _from_yaml(path: Path, known: Mapping[str, Flag], argv: Sequence[str]) -> dict[str, Any]:
    """Read the values of a file, less those that the command line gives again."""
    content = read_config(path)
    content.pop("log_format", None)  # `main` has set up the logs already
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}
    values = {key: None if key in given else value for key, value in content.items()}
    return _read_all(values, known, lambda key: f"--config {path}{_line(path, key)}", what="key")


def _line(path: Path, key: str) -> str:
    line = line_of(path, key)
    return "" if line is None else f", line {line}"


def _read_all(
    values: Mapping[Any, Any], known: Mapping[str, Flag], where: Callable[[str], str], *, what: str
) -> dict[str, Any]:
    """Convert values to their flags' types; None stands for the default.

    Args:
        where: returns the place of a key, for messages.
    """
    aliases = {alias.lstrip("-"): one.name for one in known.values() for alias in one.aliases}
    read: dict[str, Any] = {}
    for given, value in values.items():
        key = aliases.get(given, given)
        if key != given and key in values:
            raise ConfigurationError(
                f"{where(str(given))}: {given} and {key} are one {what}; give one of them"
            )
        if key not in known:
            hint = did_you_mean(str(key), known, HABITS)
            raise ConfigurationError(f"{where(str(key))}: unknown {what} {key!r}.{hint}")
        if value is None:
            continue
        try:
            read[key] = known[key].read(value)
        except ValueError as error:
            raise ConfigurationError(f"{where(given)}: {what} {given}: {error}") from error
    return read
