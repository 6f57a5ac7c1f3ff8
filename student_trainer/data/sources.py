"""The loading of the rows that the flags name: files, Hub datasets, a mixture or a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from shared.errors import (
    ConfigurationError,
)
from student_trainer.config.arguments import (
    DataArguments,
    DatasetArguments,
)
from student_trainer.data.conversation import check_columns
from student_trainer.data.mixture import Mixture
from student_trainer.data.row_files import is_hub_id
from student_trainer.data.rows import (
    Row,
    iterate_named,
    iterate_rows,
    load_rows,
    named_rows,
)
from student_trainer.data.stream import RowStream

logger = logging.getLogger(__name__)

ROWS_CHECKED = 100  # rows of each dataset of a stream that are checked before the run
_DEFAULT_BUFFER = 10_000


@dataclass(frozen=True)
class Rows:
    """The rows of a run.

    Attributes:
        train: (where, row) pairs to train on, as a list or a stream.
        held_out: (where, row) pairs to evaluate on, or None.
        mixture: the shares of several datasets in memory; None for one dataset or a stream.
    """

    train: list[Row] | RowStream
    held_out: list[Row] | None
    mixture: Mixture | None = None


def read_rows(
    dataset: DatasetArguments,
    data: DataArguments,
    seed: int,
    given: Mapping[str, Sequence[str]] | None = None,
) -> Rows:
    """Return the rows that the flags name; the first rows of a stream are checked.

    Args:
        given: values of columns for each dataset in turn; those of a row itself come first.

    Raises:
        DatasetError: a dataset is missing, empty or malformed.
        ConfigurationError: a flag has no effect on these rows.
    """
    _check_hub_flags(dataset, data)
    mixture = None
    train: list[Row] | RowStream
    if data.streaming:
        train = _stream(dataset, data, seed, given or {})
        check_columns(train.head(ROWS_CHECKED), data)
        if train.weights is not None:
            for name, weight in zip(train.names, train.weights, strict=True):
                share = weight / sum(train.weights)
                logger.warning("%s: %.1f%% of the stream's rows", name, 100 * share)
    elif dataset.rows is not None:
        train = named_rows(dataset.rows, "dataset")
    else:
        parts = [
            [
                _with_columns(row, given or {}, number)
                for row in load_rows(
                    name, config=dataset.dataset_config, split=dataset.dataset_split
                )
            ]
            for number, name in enumerate(dataset.dataset_name)
        ]
        train = [row for part in parts for row in part]
        if len(parts) > 1:
            sizes = [len(part) for part in parts]
            mixture = Mixture(dataset.dataset_name, sizes, data.dataset_weights, seed)
    if not isinstance(train, RowStream):
        check_columns(train, data)
    if data.eval_rows is not None:
        return Rows(train, named_rows(data.eval_rows, "eval_dataset"), mixture)
    if not data.eval_dataset_name:
        return Rows(train, None, mixture)
    held_out = load_rows(
        data.eval_dataset_name, config=dataset.dataset_config, split=data.eval_dataset_split
    )
    return Rows(train, held_out, mixture)


def _check_hub_flags(dataset: DatasetArguments, data: DataArguments) -> None:
    names = [] if dataset.rows is not None else list(dataset.dataset_name)
    if data.eval_rows is None and data.eval_dataset_name:
        names.append(data.eval_dataset_name)
    if dataset.dataset_config is not None and not any(map(is_hub_id, names)):
        raise ConfigurationError(
            f"--dataset_config {dataset.dataset_config} has no effect on files; it is for a "
            "dataset of the Hub"
        )


def _with_columns(row: Row, given: Mapping[str, Sequence[str]], dataset: int) -> Row:
    """Return a row with the columns that its dataset gives and it lacks."""
    where, columns = row
    lacking = {name: values[dataset] for name, values in given.items() if not columns.get(name)}
    return (where, {**columns, **lacking}) if lacking else row


def _stream(
    dataset: DatasetArguments, data: DataArguments, seed: int, given: Mapping[str, Sequence[str]]
) -> RowStream:
    rows = dataset.rows
    if rows is not None:
        if iter(rows) is rows:
            raise ConfigurationError(
                "streaming: rows that can be read once only cannot be read again to resume; give "
                "a list, a datasets.IterableDataset, or any object with __iter__"
            )
        sources = [partial(iterate_named, rows, "dataset")]
    else:
        sources = [
            partial(_iterate, name, number, dataset, given)
            for number, name in enumerate(dataset.dataset_name)
        ]
    size = data.shuffle_buffer_size or _DEFAULT_BUFFER
    return RowStream(dataset.dataset_name, sources, data.dataset_weights, seed, size)


def _iterate(
    name: str, number: int, dataset: DatasetArguments, given: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    rows = iterate_rows(
        name, config=dataset.dataset_config, split=dataset.dataset_split, streaming=True
    )
    return (_with_columns(row, given, number) for row in rows)
