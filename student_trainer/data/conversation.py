"""The columns of a row, in any of the forms that people have, as one conversation or plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.errors import DatasetError
from student_trainer.config import DataArguments

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A row of messages, in OpenAI's form.

    Attributes:
        prompt: the turns before the completion, at least one.
        completion: the assistant's turn that is learned, or None for a bare prompt.
        tools: functions that the template is to print, in OpenAI's form, or None.
        template_kwargs: options of the chat template that this row sets itself.
    """

    prompt: list[Message]
    completion: Message | None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """A row of text that no template touches; ``completion`` is None for a bare prompt."""

    prompt: str
    completion: str | None


def read_row(where: str, row: dict[str, Any], options: DataArguments) -> Conversation | PlainText:
    """Return what a row holds.

    Args:
        where: file and line, or row number, for messages.

    Raises:
        DatasetError: names the row and the column that cannot be read.
    """
    if isinstance(row.get("messages"), list):
        messages = _check_messages(where, "messages", row["messages"])
        if messages[-1]["role"] == "assistant":
            if len(messages) == 1:
                raise DatasetError(f"{where}: messages hold no turn before the assistant's")
            return Conversation(messages[:-1], messages[-1])
        return Conversation(messages, None)
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
            return Conversation(messages, {"role": "assistant", "content": completion})
        if completion is None:
            return Conversation(messages, None)
        turns = _check_messages(where, options.completion_column, completion)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DatasetError(f"{where}: {options.completion_column} must be one assistant turn")
        return Conversation(messages, turns[0])
    if not isinstance(prompt, str) or not (completion is None or isinstance(completion, str)):
        raise DatasetError(f"{where}: prompt and completion must both be text, or both messages")
    if completion == "":
        raise DatasetError(f"{where}: the completion is empty; there is nothing to learn")
    if options.prompt_column != "prompt":  # a mapped column of a chat dataset: one user turn
        messages = [{"role": "user", "content": prompt}]
        turn = None if completion is None else {"role": "assistant", "content": completion}
        return Conversation(messages, turn)
    return PlainText(prompt, completion)


def _check_messages(where: str, column: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: {column} must be a list of at least one message")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DatasetError(f"{where}: {column}[{number}] must be an object with role, content")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DatasetError(f"{where}: {column}[{number}] has no content")
    return value
