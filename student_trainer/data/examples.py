"""One row -> examples: token ids of prompt and completion, and which of them are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.errors import DatasetError, RowTooLongError
from student_trainer.config import DataArguments
from student_trainer.data.conversation import PlainText, read_row
from student_trainer.data.sample import Example, Sample
from student_trainer.data.template import (
    _all_assistant_turns,
    _completion_ids,
    _ids,
    _render,
    _require_template,
)


@dataclass(frozen=True)
class RowTokenizer:
    """A function of a row alone, so that rows can be tokenized in any process and order.

    Attributes:
        stop_ids: tokens that end a completion; the first is appended where one lacks its end.
        max_length: longest prompt and completion, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    options: DataArguments
    max_length: int

    def __call__(self, index: int, where: str, row: dict[str, Any]) -> list[Example]:
        """Return the examples of a row.

        Args:
            index: position of the row in the dataset.
            where: file and line, or row number, for messages.

        Raises:
            DatasetError: the row cannot be rendered, or leaves nothing to learn.
            RowTooLongError: it leaves no room for a completion.
        """
        return [
            _tokenize(
                index, where, row, self.tokenizer, self.stop_ids, self.options, self.max_length
            )
        ]


def _tokenize(
    index: int,
    where: str,
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
    options: DataArguments,
    max_length: int,
) -> Example:
    parsed = read_row(where, row, options)
    prompt, completion = parsed.prompt, parsed.completion
    if isinstance(parsed, PlainText):
        text = parsed.prompt
        prompt_ids = _ids(tokenizer, text, add_special_tokens=True)
        sample = None
        if completion is not None:
            ids = [*_ids(tokenizer, completion), stop_ids[0]]
            sample = _sample(prompt_ids, ids, max_length)
    else:
        _require_template(where, tokenizer)
        text = _render(where, tokenizer, prompt, add_generation_prompt=True)
        prompt_ids = _ids(tokenizer, text)
        sample = None
        if completion is not None:
            messages = [*prompt, completion]
            if options.assistant_only_loss:
                sample = _all_assistant_turns(where, tokenizer, messages, max_length)
            else:
                ids = _completion_ids(where, tokenizer, messages, text, stop_ids)
                sample = _sample(prompt_ids, ids, max_length)
    if not prompt_ids:
        raise DatasetError(f"{where}: the prompt is empty; a completion needs a token before it")
    if len(prompt_ids) >= max_length:
        raise RowTooLongError(
            f"{where}: the prompt has {len(prompt_ids)} tokens; the limit of {max_length} leaves "
            "none for a completion"
        )
    checker = row.get("checker")
    if checker is not None and not isinstance(checker, dict):
        raise DatasetError(f"{where}: checker must be an object, got {type(checker).__name__}")
    return Example(index, where, np.asarray(prompt_ids, dtype=np.uint32), sample, checker, text)


def _sample(prompt_ids: list[int], ids: list[int], max_length: int) -> Sample | None:
    if not prompt_ids or len(prompt_ids) >= max_length:
        return None  # the caller names the row
    room = max_length - len(prompt_ids)
    return Sample(
        token_ids=np.asarray([*prompt_ids, *ids[:room]], dtype=np.uint32),
        completion_start=len(prompt_ids),
        completion_mask=np.ones(min(len(ids), room), dtype=bool),
        source="dataset",
        truncated=len(ids) > room,
    )
