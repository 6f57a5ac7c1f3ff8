"""The reading and checking of command lines without a model, a teacher or a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from student_trainer.config.arguments import Recipe
from student_trainer.config.checks import (
    check_distillation,
    check_evaluate,
    check_recipe,
)
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.machine import check_machine
from student_trainer.config.parse import parse
from student_trainer.config.training_arguments import CommonTrainingArguments, training_arguments
from teacher_server import cli
from teacher_server.limits.auth import load_keys
from teacher_server.settings import Settings


@contextlib.contextmanager
def installed(package: str) -> Iterator[None]:
    """Let a package count as installed, where flags of machines that have it are only checked."""
    find = importlib.util.find_spec
    with mock.patch.object(
        importlib.util,
        "find_spec",
        lambda name, *rest: object() if name == package else find(name, *rest),
    ):
        yield


def read_trainer(argv: Sequence[str]) -> tuple[Any, ...]:
    """Return the dataclasses of flags that ``student-trainer`` reads from arguments.

    Raises:
        ConfigurationError: it refuses them.
    """
    command, *flags = argv
    parts = parse(flags, *ARGUMENTS[command], prog=f"student-trainer {command}", description="")
    if command == "evaluate":
        model, dataset, generation, _, teacher, args = parts
        check_evaluate(model, dataset, generation, teacher, args)
    elif command in ("sft", "distill"):
        with installed("vllm"):
            parts = (*parts[:-1], checked(parts))
    return parts


def flag_value(parts: Sequence[Any], name: str) -> Any:
    """Return the value of a flag, whichever of `read_trainer`'s dataclasses has it.

    Raises:
        StopIteration: none has it.
    """
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def checked(parts: Sequence[Any]) -> CommonTrainingArguments:
    """Return the Trainer's arguments of `sft` or `distill`, from the parts that `parse` returned.

    Raises:
        ConfigurationError: a flag is refused.
    """
    recipe, flags = Recipe(*parts[:6]), parts[-1]
    teacher = parts[6] if len(parts) == 8 else None
    if teacher is not None:
        check_distillation(recipe, teacher, flags)
    else:
        check_recipe(recipe, flags)
    args = training_arguments(flags)
    check_machine(recipe, args, teacher)
    return args


def read_server(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings that ``teacher-server`` reads from arguments, as if vLLM was installed.

    Raises:
        ConfigurationError: it refuses them.
    """
    monkeypatch.setattr("teacher_server.settings.find_spec", lambda name: name)
    parsed, engine_flags = cli._parsers()[0].parse_known_args(cli._with_file(argv))
    arguments = {**vars(parsed), "engine_flags": tuple(engine_flags)}
    for name in ("log_level", "log_format", "command", "config"):
        del arguments[name]
    settings = Settings(**arguments)
    load_keys(settings)
    return settings


def with_key(argv: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments with a file in ``folder`` in place of the key file that they name."""
    key = folder / "teacher.key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    flags = ("--api-key-file", "--teacher_api_key_file")
    changed, follows = [], False
    for argument in argv:
        name = argument.split("=")[0]
        if follows:
            changed.append(str(key))
        elif name in flags and "=" in argument:
            changed.append(f"{name}={key}")
        else:
            changed.append(argument)
        follows = argument in flags
    return changed


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield each line of the page's code blocks, split as a shell does, without its variables."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            yield list(dropwhile(re.compile(r"[A-Z_]+=").match, words))


def trainer_lines(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each ``student-trainer`` on the page, however it is started."""
    for line in command_lines(page):
        if "student_trainer" in line:
            yield line[line.index("student_trainer") + 1 :]
        elif line and line[0] == "student-trainer":
            yield line[1:]


def server_lines(page: Path) -> Iterator[list[str]]:
    """Return the arguments of each ``teacher-server`` on the page."""
    return (line[1:] for line in command_lines(page) if line and line[0] == "teacher-server")
