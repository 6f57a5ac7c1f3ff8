"""The parser of flags, YAML and Python keywords into the dataclasses of `config.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError
from shared.nearest import nearest
from shared.yaml_file import config_path, read_config
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import Flag, flags_of
from student_trainer.config.help import add_help


def make_parser(*types: type[Any], prog: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a command, with all flags of its dataclasses."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
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
            value that a dataclass refuses.
        SystemExit: --help, or a value of the wrong type (argparse's own message).
    """
    parser, known = make_parser(*types, prog=prog, description=description), _flags(types)
    values: dict[str, Any] = {}
    path = config_path(argv)
    if path is not None:
        values = _from_yaml(path, known, argv)
    # argparse fills in its defaults only where the namespace has no value yet.
    namespace, unknown = parser.parse_known_args(list(argv), argparse.Namespace(**values))
    if unknown:
        name = unknown[0].split("=")[0]
        near = nearest(name.lstrip("-").replace("-", "_"), known)
        hint = f" Did you mean --{near}?" if near else f" See {prog} --help_all."
        raise ConfigurationError(f"unknown argument {name!r}.{hint}")
    return _instances(types, vars(namespace))


def parse_keywords(command: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what `parse` returns for a command, from keywords with the names of its flags.

    Raises:
        ConfigurationError: as `parse`, and for a value of the wrong type.
    """
    types, where = ARGUMENTS[command], f"{command}()"
    return _instances(types, _read_all(values, _flags(types), where, what="keyword"))


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


def _from_yaml(path: Path, known: Mapping[str, Flag], argv: Sequence[str]) -> dict[str, Any]:
    """Read the values of a file, less those that the command line gives again."""
    content = read_config(path)
    content.pop("log_format", None)  # `main` has set up the logs already
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}
    values = {key: None if key in given else value for key, value in content.items()}
    return _read_all(values, known, f"--config {path}", what="key")


def _read_all(
    values: Mapping[Any, Any], known: Mapping[str, Flag], where: str, *, what: str
) -> dict[str, Any]:
    """Convert values to their flags' types; None stands for the default."""
    read = {}
    for key, value in values.items():
        if key not in known:
            near = nearest(str(key), known)
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigurationError(f"{where}: unknown {what} {key!r}{hint}")
        if value is None:
            continue
        try:
            read[key] = known[key].read(value)
        except ValueError as error:
            raise ConfigurationError(f"{where}: {what} {key}: {error}") from error
    return read
