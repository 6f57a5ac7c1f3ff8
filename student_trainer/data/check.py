"""Checks of rows and of the examples made of them, before a model loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.errors import DatasetError
from student_trainer.config import DataArguments
from student_trainer.data.sample import Example


def check_token_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Refuse rows with tokens that an output layer has no row for.

    Raises:
        DatasetError: names row and token.
    """
    for example in examples:
        sample = example.sample
        ids = example.prompt_ids if sample is None else sample.token_ids
        worst = int(ids.max(initial=0))
        if worst >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(worst)
            raise DatasetError(
                f"{example.name}: its token {token!r} (id {worst}) is outside the vocabulary of "
                f"{vocab_size} that the models share; take it out of the text"
            )


def texts_of(
    rows: Iterable[tuple[str, Mapping[str, Any]]], options: DataArguments
) -> Iterator[tuple[str, str]]:
    """Yield (where it stands, text) of every text in the columns that are rendered."""
    for where, row in rows:
        for column in (options.prompt_column, options.completion_column, "messages"):
            for text in _texts(row.get(column)):
                yield where, text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item.get("content") if isinstance(item, Mapping) else item)
