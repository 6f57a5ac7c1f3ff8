"""The tokenization of all rows, in several processes, with a cache of the result.

Each row is rendered once with the student's chat template; everything after that works on token
ids, never on text.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from typing import Any, TypeVar

from accelerate import PartialState

from shared.errors import ConfigurationError, DatasetError, RowTooLongError
from student_trainer.data import token_cache
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.sample import Example
from student_trainer.runtime.progress import tracked

T = TypeVar("T")
U = TypeVar("U")

_Item = tuple[int, str, dict[str, Any]]

# With fewer rows, processes and a cache file cost more than they save.
FEW_ROWS = 2000
_MOST_PROCESSES = 8
_CHUNK = 64  # rows in one task of a process


def tokenize_rows(
    rows: Sequence[tuple[str, dict[str, Any]]],
    row_tokenizer: RowTokenizer,
    *,
    skip_long_rows: bool = False,
    remedy: str = "Shorten it",
    description: str = "Tokenizing",
    progress: bool = True,
    num_proc: int | None = None,
) -> list[Example]:
    """Return the examples of all rows, without those that are too long if they may be skipped.

    From `FEW_ROWS` rows on, several processes tokenize, and the result is kept in the cache folder
    of `datasets`: the same rows and options are not tokenized again. Of the ranks on one machine
    the first tokenizes, and the others read its file.

    Args:
        remedy: advice in the message about a row that is too long.
        num_proc: number of processes; None for as many as there are CPUs, up to 8.

    Raises:
        DatasetError: names the first row that cannot be rendered or leaves nothing to learn.
    """
    file = None
    if len(rows) >= FEW_ROWS:
        file = token_cache.file_of(rows, [row_tokenizer.fingerprint, str(skip_long_rows)])
    with nullcontext() if file is None else PartialState().local_main_process_first():
        found = None if file is None else token_cache.read(file)
        if found is not None:
            return found
        outcomes = _outcomes(rows, row_tokenizer, num_proc)
        counted = tracked(outcomes, len(rows), description, show=progress)
        made = keep_short(counted, _raise_if_too_long, skip=skip_long_rows, remedy=remedy)
        examples = [example for of_row in made for example in of_row]
        if file is not None and PartialState().is_local_main_process:
            token_cache.write(file, examples)
    return examples


def keep_short(items: Iterable[T], make: Callable[[T], U], *, skip: bool, remedy: str) -> list[U]:
    """Return ``make(item)`` for each item, without those too long if ``skip`` is true.

    Raises:
        RowTooLongError: an item is too long and ``skip`` is false; with the remedy.
        DatasetError: every item is too long, or ``make`` raises it.
    """
    kept, last = [], None
    for item in items:
        try:
            kept.append(make(item))
        except RowTooLongError as error:
            if not skip:
                raise RowTooLongError(f"{error}. {remedy}") from error
            last = error
    if last is not None and not kept:
        raise DatasetError(f"every row is too long. The last one: {last}")
    return kept


def _outcomes(
    rows: Sequence[tuple[str, dict[str, Any]]], row_tokenizer: RowTokenizer, num_proc: int | None
) -> Iterator[_Outcome]:
    """Yield the examples of each row, or the error that it is too long, in the rows' order."""
    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0))) if num_proc is None else num_proc
    numbered = [(index, where, row) for index, (where, row) in enumerate(rows)]
    alone = len(rows) if len(rows) < FEW_ROWS or processes == 1 else _CHUNK
    for item in numbered[:alone]:  # an error that all rows share shows before processes start
        yield _outcome(row_tokenizer, item)
    if alone == len(rows):
        return
    chunks = [numbered[first : first + _CHUNK] for first in range(alone, len(rows), _CHUNK)]
    # With fork, processes inherit the tokenizer, and a script needs no `if __name__` guard.
    context = multiprocessing.get_context("fork")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns at each fork
    pool = ProcessPoolExecutor(
        processes, context, initializer=_start_worker, initargs=(row_tokenizer,)
    )
    try:
        for outcomes in pool.map(_tokenize_chunk, chunks):
            yield from outcomes
    except BrokenProcessPool as error:
        raise ConfigurationError(
            f"a process that tokenized was ended from outside, as when memory runs out; pass fewer "
            f"than --dataset_num_proc {processes}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# The examples of a row, or the error that it is too long; other errors are raised at once.
_Outcome = list[Example] | RowTooLongError
_worker_tokenizer: list[RowTokenizer] = []  # set once in each worker process


def _start_worker(row_tokenizer: RowTokenizer) -> None:
    _worker_tokenizer[:] = [row_tokenizer]


def _tokenize_chunk(items: Sequence[_Item]) -> list[_Outcome]:
    return [_outcome(_worker_tokenizer[0], item) for item in items]


def _outcome(row_tokenizer: RowTokenizer, item: _Item) -> _Outcome:
    try:
        return row_tokenizer(*item)
    except RowTooLongError as error:
        return error


def _raise_if_too_long(outcome: _Outcome) -> list[Example]:
    if isinstance(outcome, RowTooLongError):
        raise outcome
    return outcome
