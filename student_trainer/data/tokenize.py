"""Rows -> token ids and a completion mask.

A row is `messages` (the last turn is the completion when the assistant speaks it), or `prompt` with
or without `completion`, conversational or plain text. Each is rendered once with the student's chat
template; from then on token ids travel, never text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from shared.errors import DatasetError, RowTooLongError
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.sample import Example
from student_trainer.progress import tracked

T = TypeVar("T")
U = TypeVar("U")


def tokenize_rows(
    rows: Sequence[tuple[str, dict[str, Any]]],
    row_tokenizer: RowTokenizer,
    *,
    skip_long_rows: bool = False,
    remedy: str = "Shorten it",
    description: str = "Tokenizing",
    progress: bool = True,
) -> list[Example]:
    """Examples of all rows, less those that are too long if ``skip_long_rows`` says so.

    Args:
        remedy: what the message about a row that is too long advises.

    Raises:
        DatasetError: names the first row that cannot be rendered or leaves nothing to learn.
    """
    counted = tracked(rows, len(rows), description, show=progress)
    numbered = ((index, where, row) for index, (where, row) in enumerate(counted))
    made = keep_short(
        numbered, lambda item: row_tokenizer(*item), skip=skip_long_rows, remedy=remedy
    )
    return [example for examples in made for example in examples]


def keep_short(items: Iterable[T], make: Callable[[T], U], *, skip: bool, remedy: str) -> list[U]:
    """``make`` of each item, less those it finds too long where ``skip`` allows that.

    Raises:
        DatasetError: what ``make`` raises, or nothing is left.
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
