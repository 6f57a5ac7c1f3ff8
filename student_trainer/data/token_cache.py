"""A cache of tokenized rows: Arrow files in the cache folder of `datasets`.

A file is named by a hash of the rows and of all that their tokens depend on, so it is never out of
date. ``HF_DATASETS_CACHE`` sets the folder, and ``datasets.disable_caching()`` turns it off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_trainer.data.sample import Example, Sample

logger = logging.getLogger(__name__)

_VERSION = "1"  # of the columns in `_features`
_BATCH = 1000  # examples in one write


def file_of(rows: Sequence[tuple[str, dict[str, Any]]], depends_on: Sequence[str]) -> Path | None:
    """Return the file for these rows; None where the caching of `datasets` is disabled.

    Args:
        depends_on: everything that the tokens depend on beside the rows.
    """
    import datasets

    if not datasets.is_caching_enabled():
        return None
    digest = hashlib.sha256(json.dumps([_VERSION, *depends_on]).encode())
    for where, row in rows:
        digest.update(json.dumps([where, row], default=repr).encode() + b"\n")
    return Path(datasets.config.HF_DATASETS_CACHE) / "sparse-gkd" / f"{digest.hexdigest()}.arrow"


def write(file: Path, examples: Sequence[Example]) -> None:
    """Write the examples into a file, or nothing if `read` could not return all of them unchanged.

    The file is complete or does not exist. If the disk is full, it logs a warning.
    """
    from datasets.arrow_writer import ArrowWriter

    if any(not _round_trips(example) for example in examples):
        return
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(path=str(part), features=_features()) as writer:
            for first in range(0, len(examples), _BATCH):
                records = [_record(example) for example in examples[first : first + _BATCH]]
                writer.write_batch({name: [r[name] for r in records] for name in records[0]})
            writer.finalize()
        part.replace(file)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        logger.warning("tokenized rows are not kept in %s: %s", file, error.strerror or error)


def read(file: Path) -> list[Example] | None:
    """Return the examples of a file; None if it does not exist or is damaged."""
    import datasets
    import pyarrow

    if not file.exists():
        return None
    try:
        table = datasets.Dataset.from_file(str(file)).data.table
        examples = [e for batch in table.to_batches() for e in _examples(batch)]
    except (OSError, pyarrow.ArrowException, ValueError, KeyError) as error:
        logger.warning("%s is damaged, so the rows are tokenized anew: %s", file, error)
        return None
    logger.info("tokenized rows are read from %s", file)
    return examples


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({
        "index": Value("int64"),
        "name": Value("string"),
        "prompt_ids": List(Value("uint32")),
        "has_sample": Value("bool"),
        "token_ids": List(Value("uint32")),
        "completion_start": Value("int64"),
        "completion_mask": List(Value("bool")),
        "truncated": Value("bool"),
        "checker": Value("string"),
        "prompt": Value("string"),
        "notes": List(Value("string")),
        "teacher": Value("string"),
        "has_teacher_prompt": Value("bool"),
        "teacher_prompt_ids": List(Value("uint32")),
    })  # fmt: skip


def _round_trips(example: Example) -> bool:
    """Return whether `read` gives this example back unchanged after `write`."""
    sample = example.sample
    if sample is not None and (sample.source != "dataset" or sample.weight_version is not None):
        return False
    try:
        return bool(json.loads(json.dumps(example.checker)) == example.checker)
    except (TypeError, ValueError):
        return False


def _record(example: Example) -> dict[str, Any]:
    sample = example.sample
    return {
        "index": example.index,
        "name": example.name,
        "prompt_ids": example.prompt_ids,
        "has_sample": sample is not None,
        "token_ids": np.zeros(0, np.uint32) if sample is None else sample.token_ids,
        "completion_start": 0 if sample is None else sample.completion_start,
        "completion_mask": np.zeros(0, bool) if sample is None else sample.completion_mask,
        "truncated": sample is not None and sample.truncated,
        "checker": None if example.checker is None else json.dumps(example.checker),
        "prompt": example.prompt,
        "notes": list(example.notes),
        "teacher": example.teacher,
        "has_teacher_prompt": example.teacher_prompt_ids is not None,
        "teacher_prompt_ids": np.zeros(0, np.uint32)
        if example.teacher_prompt_ids is None
        else example.teacher_prompt_ids,
    }


def _examples(batch: Any) -> Iterator[Example]:
    columns = {name: batch.column(name) for name in batch.schema.names}
    arrays = ("prompt_ids", "token_ids", "completion_mask", "teacher_prompt_ids")
    lists = {name: _arrays(columns.pop(name)) for name in arrays}
    plain = {name: column.to_pylist() for name, column in columns.items()}
    for row in range(batch.num_rows):
        one = {name: values[row] for name, values in plain.items()}
        sample = None
        if one["has_sample"]:
            sample = Sample(
                lists["token_ids"][row],
                one["completion_start"],
                lists["completion_mask"][row],
                "dataset",
                truncated=one["truncated"],
            )
        checker = None if one["checker"] is None else json.loads(one["checker"])
        yield Example(
            one["index"], one["name"], lists["prompt_ids"][row], sample, checker, one["prompt"],
            tuple(one["notes"]), one["teacher"],
            lists["teacher_prompt_ids"][row] if one["has_teacher_prompt"] else None,
        )  # fmt: skip


def _arrays(column: Any) -> list[NDArray[Any]]:
    """Return the lists of a column as separate arrays."""
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:end].copy() for start, end in pairwise(offsets)]
