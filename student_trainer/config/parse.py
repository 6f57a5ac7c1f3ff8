"""Flags, YAML and Python keywords, read into the dataclasses of `config.arguments`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from shared.errors import ConfigurationError
from shared.yaml_file import config_path, flag_arguments, read_config, to_argument
from student_trainer.config.arguments import (
    AdapterArguments,
    DataArguments,
    DatasetArguments,
    DistillArguments,
    EvaluateArguments,
    GenerationArguments,
    MergeArguments,
    ModelArguments,
    SFTArguments,
    TeacherArguments,
    TemplateArguments,
)
from student_trainer.config.help import add_help

_RECIPE = (
    ModelArguments,
    AdapterArguments,
    DatasetArguments,
    DataArguments,
    GenerationArguments,
    TemplateArguments,
)
# What each command is told, in the order in which `parse` returns it.
ARGUMENTS: dict[str, tuple[type[Any], ...]] = {
    "sft": (*_RECIPE, SFTArguments),
    "distill": (*_RECIPE, TeacherArguments, DistillArguments),
    "evaluate": (
        ModelArguments,
        DatasetArguments,
        GenerationArguments,
        TemplateArguments,
        TeacherArguments,
        EvaluateArguments,
    ),
    "merge": (MergeArguments,),
}


def make_parser(*types: type[Any], prog: str, description: str) -> HfArgumentParser:
    """All flags of a command."""
    parser = HfArgumentParser(
        types, prog=prog, description=description, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", metavar="YAML", help="File with the same names as the flags.")
    for action in parser._actions:  # this field may hold several; the parser takes one
        action.nargs = "+" if action.dest == "report_to" else action.nargs
    add_help(parser)
    return parser


def parse(
    argv: Sequence[str],
    *types: type[Any],
    prog: str,
    description: str,
    exit_on_error: bool = True,
) -> tuple[Any, ...]:
    """Dataclass instances of ``types`` from ``--config`` YAML and the command line.

    Args:
        exit_on_error: argparse's own; False raises `argparse.ArgumentError` for a wrong value.

    Raises:
        ConfigurationError: unknown flag or key (with the nearest known one), unreadable YAML, or a
            value that a dataclass refuses.
        SystemExit: --help, or a value of the wrong type (argparse's own message).
    """
    parser = make_parser(*types, prog=prog, description=description)
    parser.exit_on_error = exit_on_error
    known = _names(types)
    words = list(argv)
    path = config_path(words)
    if path is not None:
        words = _yaml_to_words(path, known, words) + words
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), known, n=1)
        hint = f" Did you mean --{near[0]}?" if near else f" See {prog} --help_all."
        raise ConfigurationError(f"unknown argument {flag!r}.{hint}")
    values = vars(namespace)
    try:
        return tuple(
            kind(**{f.name: values[f.name] for f in fields(kind) if f.init and f.name in values})
            for kind in types
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(str(error)) from error


def parse_keywords(command: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `parse` returns for a command, from Python keywords with the names of its flags.

    Raises:
        ConfigurationError: as `parse`, and for a value of the wrong type.
    """
    types, where = ARGUMENTS[command], f"{command}()"
    words = _to_words(values, _names(types), where, what="keyword")
    try:
        return parse(words, *types, prog=where, description="", exit_on_error=False)
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _names(types: Iterable[type[Any]]) -> set[str]:
    return {f.name for kind in types for f in fields(kind) if f.init}


def _yaml_to_words(path: Path, known: set[str], overrides: list[str]) -> list[str]:
    """The file as flags; keys that the command line gives again are left out."""
    content = read_config(path)
    content.pop("log_format", None)  # was obeyed before flags were read
    given = {w.split("=")[0].lstrip("-").replace("-", "_") for w in overrides if w.startswith("--")}
    left = {key: None if key in given else value for key, value in content.items()}
    return _to_words(left, known, f"--config {path}", what="key")


def _to_words(values: Mapping[Any, Any], known: set[str], where: str, *, what: str) -> list[str]:
    """Flags with their values, less those that are None."""
    words: list[str] = []
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"{where}: unknown {what} {key!r}{hint}")
        words += flag_arguments(key, value, _to_word)
    return words


def _to_word(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return to_argument(value)
