"""Check, before torch is imported, that flags name rows that are there, and a usable folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from shared.errors import ConfigurationError, DatasetError
from shared.model_names import existing, looks_local, near_path
from student_trainer.config.arguments import DataArguments, DatasetArguments

_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow",
    ".gz", ".bz2", ".xz", ".zst",
)  # fmt: skip


def check_output_folder(folder: str | None) -> None:
    """Check that ``--output_dir`` could be made and written to; nothing is left there.

    Raises:
        ConfigurationError: it could not.
    """
    path = Path(folder or "")
    nearest = next(each for each in (path, *path.absolute().parents) if existing(each))
    if not nearest.is_dir() or not _takes_files(nearest):
        raise ConfigurationError(
            f"--output_dir {path}: {nearest} is no folder that can be written to; give another"
        )


def _takes_files(folder: Path) -> bool:
    """Return whether a folder can be made in this one; root has rights that /proc does not obey."""
    try:
        if os.access(folder, os.W_OK | os.X_OK):
            with TemporaryDirectory(dir=folder):
                return True
    except OSError:
        pass
    return False


def check_rows_exist(dataset: DatasetArguments, data: DataArguments | None = None) -> None:
    """Check that datasets which cannot be Hub ids are there; what they hold is read later.

    Raises:
        DatasetError: names the flag and the path.
    """
    names = [("dataset_name", name) for name in dataset.dataset_name if dataset.rows is None]
    if data is not None and data.eval_rows is None and data.eval_dataset_name:
        names.append(("eval_dataset_name", data.eval_dataset_name))
    for flag, name in names:
        local = looks_local(name) or name.lower().endswith(_SUFFIXES)
        if local and not glob.has_magic(name) and existing(name) is None:
            raise DatasetError(
                f"--{flag} {name}: no such file or folder{near_path(name)}; give a file of rows, "
                "a folder of them, a glob, or a Hub id"
            )
