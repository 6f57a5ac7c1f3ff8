"""Check the flags of a study's cells before the first of them runs."""

from __future__ import annotations

from typing import Any

from shared.command_line import did_you_mean
from shared.errors import ConfigurationError, DatasetError
from shared.model_names import existing
from student_trainer.config.arguments import DataArguments, DatasetArguments
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import Flag, flags_of
from student_trainer.config.habits import HABITS
from student_trainer.data.first_rows import first_rows
from student_trainer.study.spec import Cell, Study, references

_SPLITS = {
    "dataset_name": DatasetArguments.dataset_split,
    "eval_dataset_name": DataArguments.eval_dataset_split,
}


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


def check_rows(study: Study) -> None:
    """Check the first rows of the files that cells name and that are there already.

    Others may be made by a cell; its own command checks them.

    Raises:
        DatasetError: a file holds no rows, or a line that cannot be read; with file and key.
    """
    for cell in study.cells.values():
        for key in _SPLITS if cell.command in ARGUMENTS else ():
            value = cell.flags.get(key, [])
            split = str(cell.flags.get(key.replace("_name", "_split"), _SPLITS[key]))
            for name in [value] if isinstance(value, str) else value:
                if references([name, split]) or not existing(str(name)):
                    continue
                try:
                    first_rows(str(name), split)
                except DatasetError as error:
                    source = f"{study.path}: {cell.source}.flags.{key}"
                    raise DatasetError(f"{source}: {error}") from error


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
