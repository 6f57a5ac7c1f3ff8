"""Check the flags of a study's cells before the first of them runs."""

from __future__ import annotations

import contextlib
import difflib
import io
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from shared.errors import ConfigurationError
from student_trainer.config.parse import ARGUMENTS
from student_trainer.study.spec import Cell, Study, references, to_argv


def check_flags(study: Study) -> None:
    """Check the names and types of flags; the command itself checks what a value means.

    The flags are not made into arguments, because transformers' arguments would start CUDA in this
    process.

    Raises:
        ConfigurationError: an unknown flag or a value of the wrong type, with file and key.
    """
    parsers = {
        name: HfArgumentParser(types, allow_abbrev=False) for name, types in ARGUMENTS.items()
    }
    for cell in study.cells.values():
        if cell.command in ARGUMENTS:
            for key, value in cell.flags.items():
                _check(study, cell, key, value, parsers[cell.command])


def _check(study: Study, cell: Cell, key: str, value: Any, parser: HfArgumentParser) -> None:
    source = f"{study.path}: {cell.source}.flags.{key}"
    known = {f.name for kind in ARGUMENTS[cell.command] for f in fields(kind) if f.init}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see student-trainer {cell.command} --help"
        raise ConfigurationError(f"{source}: {cell.command} has no such flag; {hint}")
    # A seed is a number, and other references become the names of folders.
    plain = "0" if references(value) == ["seed"] else value
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parser.parse_known_args(to_argv({key: plain}))
    except SystemExit as error:
        message = errors.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ConfigurationError(f"{source}: {message}") from error
