"""Command lines, read and checked as far as possible without a model, a teacher or a GPU."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from student_trainer.config.arguments import Recipe
from student_trainer.config.checks import (
    check_distillation,
    check_evaluate,
    check_recipe,
)
from student_trainer.config.machine import check_machine
from student_trainer.config.parse import ARGUMENTS, parse
from student_trainer.config.training_arguments import CommonTrainingArguments, training_arguments
from teacher_server import cli
from teacher_server.limits.auth import load_keys
from teacher_server.settings import Settings


def read_trainer(words: Sequence[str]) -> tuple[Any, ...]:
    """What ``student-trainer`` makes of these words.

    Raises:
        ConfigurationError: it refuses them.
    """
    command, *flags = words
    parts = parse(flags, *ARGUMENTS[command], prog=f"student-trainer {command}", description="")
    if command == "evaluate":
        model, dataset, generation, _, teacher, args = parts
        check_evaluate(model, dataset, generation, teacher, args)
    elif command in ("sft", "distill"):
        parts = (*parts[:-1], checked(parts))
    return parts


def checked(parts: Sequence[Any]) -> CommonTrainingArguments:
    """The Trainer's arguments of `sft` or `distill`, of what `parse` returned.

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


def read_server(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What ``teacher-server`` makes of these words, where vLLM is installed.

    Raises:
        ConfigurationError: it refuses them.
    """
    monkeypatch.setattr("teacher_server.settings.find_spec", lambda name: name)
    parsed, engine_flags = cli._parsers()[0].parse_known_args(cli._with_file(words))
    arguments = {**vars(parsed), "engine_flags": tuple(engine_flags)}
    for name in ("log_level", "log_format", "command", "config"):
        del arguments[name]
    settings = Settings(**arguments)
    load_keys(settings)
    return settings


def with_key(words: Sequence[str], folder: Path) -> list[str]:
    """The words, with a file in ``folder`` in place of the key file that they name."""
    key = folder / "teacher.key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    flags = ("--api-key-file", "--teacher_api_key_file")
    changed, follows = [], False
    for word in words:
        name = word.split("=")[0]
        if follows:
            changed.append(str(key))
        elif name in flags and "=" in word:
            changed.append(f"{name}={key}")
        else:
            changed.append(word)
        follows = word in flags
    return changed


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of each line of the page's code blocks."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line)


def trainer_lines(page: Path) -> Iterator[list[str]]:
    """The words after ``student-trainer``, however it is started."""
    for words in command_lines(page):
        if "student_trainer" in words:
            yield words[words.index("student_trainer") + 1 :]
        elif words and words[0] == "student-trainer":
            yield words[1:]


def server_lines(page: Path) -> Iterator[list[str]]:
    """The words after ``teacher-server``."""
    return (words[1:] for words in command_lines(page) if words and words[0] == "teacher-server")
