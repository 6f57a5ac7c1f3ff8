"""Check, before torch is imported, that flags name rows that are there."""

from __future__ import annotations

import glob

from shared.errors import DatasetError
from shared.model_names import existing, looks_local, near_path
from student_trainer.config.arguments import DataArguments, DatasetArguments

_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow",
    ".gz", ".bz2", ".xz", ".zst",
)  # fmt: skip


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
