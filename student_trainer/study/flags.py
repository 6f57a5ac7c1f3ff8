"""Check the flags of a study's cells before the first of them runs."""

from __future__ import annotations

from typing import Any

from shared.command_line import did_you_mean
from shared.errors import ConfigurationError
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import Flag, flags_of
from student_trainer.config.habits import HABITS
from student_trainer.study.spec import Cell, Study, references


def check_flags(study: Study) -> None:
    """Check the names and types of flags; the command itself checks what a value means.

    The flags are not made into arguments, because transformers' arguments would start CUDA in this
    process.

    Raises:
        ConfigurationError: an unknown flag or a value of the wrong type, with file and key.
    """
    for cell in study.cells.values():
        if cell.command in ARGUMENTS:
            kinds = ARGUMENTS[cell.command]
            known = {name: one for kind in kinds for name, one in flags_of(kind).items()}
            for key, value in cell.flags.items():
                _check(study, cell, key, value, known)


def _check(study: Study, cell: Cell, key: str, value: Any, known: dict[str, Flag]) -> None:
    source = f"{study.path}: {cell.source}.flags.{key}"
    if key not in known:
        hint = did_you_mean(key, known, HABITS) or f" See student-trainer {cell.command} --help"
        raise ConfigurationError(f"{source}: {cell.command} has no such flag.{hint}")
    # A seed is a number, and other references become the names of folders.
    plain = "0" if references(value) == ["seed"] else value
    try:
        known[key].read(plain)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from error
