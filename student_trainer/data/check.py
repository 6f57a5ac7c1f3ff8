"""Checks of dataset rows and of the examples made from them, before a model loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.errors import DatasetError
from student_trainer.config.arguments import DataArguments
from student_trainer.data.conversation import PlainText, read_row
from student_trainer.data.messages import text_of
from student_trainer.data.sample import Example


def check_token_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Refuse examples that hold a token id outside the shared vocabulary.

    Args:
        vocab_size: the ids that both models' output layers have.

    Raises:
        DatasetError: a token id is outside; names the row and the token.
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
    """Yield (where, text) for every text of the rows that will be tokenized."""
    for where, row in rows:
        parsed = read_row(where, dict(row), options)
        if isinstance(parsed, PlainText):
            yield from ((where, text) for text in (parsed.prompt, parsed.completion) if text)
        else:
            for message in [*parsed.prompt, *filter(None, [parsed.completion])]:
                yield where, text_of(where, message.get("content")) or ""
