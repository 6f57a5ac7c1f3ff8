"""A look at the first rows of the datasets that flags name, before torch is imported.

It tells early, in the same words, what reading all rows would tell after the tokenizer is loaded.
"""

from __future__ import annotations

import glob
from itertools import islice
from pathlib import Path

from student_trainer.config.arguments import DataArguments, DatasetArguments
from student_trainer.config.files import check_rows_exist
from student_trainer.data.conversation import check_columns, read_row
from student_trainer.data.row_files import ARROW, files_of, format_of, is_hub_id, is_saved
from student_trainer.data.rows import Row, checked_text, no_rows, read_files

_MOST_ROWS = 100
_MOST_BYTES = 16 * 2**20  # of a .json file, because an array is parsed whole


def check_first_rows(dataset: DatasetArguments, data: DataArguments) -> None:
    """Check that the datasets of a run are there, and that their first rows can be read.

    Raises:
        DatasetError: one is missing or holds no rows, or names the line that cannot be read.
        ConfigurationError: a flag names a column that no row has.
    """
    check_rows_exist(dataset, data)
    names = [(name, dataset.dataset_split) for name in dataset.dataset_name if dataset.rows is None]
    looks = [first_rows(name, split) for name, split in names]
    read = [rows for rows in looks if rows is not None]
    if names and len(read) == len(names) and all(len(rows) < _MOST_ROWS for rows in read):
        check_columns([row for rows in read for row in rows], data)  # these are all rows
    if data.eval_rows is None and data.eval_dataset_name:
        read.append(first_rows(data.eval_dataset_name, data.eval_dataset_split) or [])
    for where, row in (row for rows in read for row in rows):
        read_row(where, dict(row), data)


def first_rows(name: str, split: str) -> list[Row] | None:
    """Return the first rows of text files; None of what is not read in a moment.

    That is a dataset of the Hub or of `save_to_disk`, a glob of nested folders, Parquet, Arrow, and
    a large ``.json`` file.

    Raises:
        DatasetError: there are no rows, or a line cannot be read; in the words of `load_rows`.
    """
    nested = glob.has_magic(name) and "**" in name
    if nested or "[" in split or is_hub_id(name):
        return None
    path = Path(name).expanduser()
    if is_saved(path):
        return None
    files, _ = files_of(name, split)
    if any(map(_is_slow, files)):
        return None
    rows = list(islice(checked_text(read_files(files)), _MOST_ROWS))
    if not rows:
        raise no_rows(name)
    return rows


def _is_slow(file: Path) -> bool:
    suffix = format_of(file)
    return suffix in ARROW or (suffix == ".json" and file.stat().st_size > _MOST_BYTES)
