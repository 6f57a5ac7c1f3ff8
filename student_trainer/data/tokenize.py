"""Rows -> token ids and a completion mask.

A row is `messages` (the last turn is the completion when the assistant speaks it), or `prompt` with
or without `completion`, conversational or plain text. Each is rendered once with the student's chat
template; from then on token ids travel, never text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.errors import DatasetError, RowTooLongError
from student_trainer.config import DataArguments
from student_trainer.data.sample import Example, Sample
from student_trainer.data.template import (
    _all_assistant_turns,
    _completion_ids,
    _ids,
    _render,
    _require_template,
)
from student_trainer.progress import tracked

T = TypeVar("T")
U = TypeVar("U")


def tokenize_rows(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    options: DataArguments,
    *,
    max_length: int,
    remedy: str = "Shorten it",
    description: str = "Tokenizing",
    progress: bool = True,
) -> list[Example]:
    """Examples of all rows, less those that are too long if ``options`` say so.

    Args:
        max_length: longest prompt and completion, in tokens.
        remedy: what the message about a row that is too long advises.

    Raises:
        DatasetError: names the first row that cannot be rendered or leaves nothing to learn.
    """
    counted = tracked(rows, len(rows), description, show=progress)
    numbered = ((index, where, row) for index, (where, row) in enumerate(counted))
    return keep_short(
        numbered,
        lambda item: _tokenize(*item, tokenizer, stop_ids, options, max_length),
        skip=options.skip_long_rows,
        remedy=remedy,
    )


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


def _tokenize(
    index: int,
    where: str,
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    options: DataArguments,
    max_length: int,
) -> Example:
    prompt, completion = _split_row(where, row, options)
    if isinstance(prompt, str):
        text = prompt
        prompt_ids = _ids(tokenizer, prompt, add_special_tokens=True)
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


def _split_row(
    where: str, row: dict[str, Any], options: DataArguments
) -> tuple[str | list[dict[str, Any]], Any]:
    """Prompt and completion, as text both, or as messages and one message."""
    if isinstance(row.get("messages"), list):
        messages = _check_messages(where, "messages", row["messages"])
        if messages[-1]["role"] == "assistant":
            if len(messages) == 1:
                raise DatasetError(f"{where}: messages hold no turn before the assistant's")
            return messages[:-1], messages[-1]
        return messages, None
    prompt = row.get(options.prompt_column)
    completion = row.get(options.completion_column)
    if prompt is None:
        raise DatasetError(
            f"{where}: neither messages nor {options.prompt_column!r}; the row has "
            f"{sorted(row)}. Name the columns with --prompt_column and --completion_column"
        )
    if isinstance(prompt, list):
        messages = _check_messages(where, options.prompt_column, prompt)
        if isinstance(completion, str):
            return messages, {"role": "assistant", "content": completion}
        if completion is None:
            return messages, None
        turns = _check_messages(where, options.completion_column, completion)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DatasetError(f"{where}: {options.completion_column} must be one assistant turn")
        return messages, turns[0]
    if not isinstance(prompt, str) or not (completion is None or isinstance(completion, str)):
        raise DatasetError(f"{where}: prompt and completion must both be text, or both messages")
    if completion == "":
        raise DatasetError(f"{where}: the completion is empty; there is nothing to learn")
    if options.prompt_column != "prompt":  # a mapped column of a chat dataset: one user turn
        messages = [{"role": "user", "content": prompt}]
        turn = None if completion is None else {"role": "assistant", "content": completion}
        return messages, turn
    return prompt, completion


def _check_messages(where: str, column: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: {column} must be a list of at least one message")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DatasetError(f"{where}: {column}[{number}] must be an object with role, content")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DatasetError(f"{where}: {column}[{number}] has no content")
    return value


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
