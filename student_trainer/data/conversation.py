"""The reading of a dataset row, in any supported format, as a conversation or plain text.

Where a row has columns of several formats, the first of these is used: ``messages``; the prompt
column with or without the completion column; ShareGPT's ``conversations``; Alpaca's
``instruction``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.errors import ConfigurationError, DatasetError
from shared.nearest import nearest
from shared.printable import one_line
from student_trainer.config.arguments import DataArguments
from student_trainer.data.messages import Message

Form = Literal["messages", "prompt", "conversations", "instruction"]

_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Role names in ShareGPT-like datasets -> OpenAI's roles.
SPEAKERS = {
    "system": "system", "developer": "developer",
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """A row of messages, in OpenAI's format.

    Attributes:
        prompt: the turns before the completion, at least one.
        completion: the assistant's turn that is learned, or None for a bare prompt.
        tools: functions that the template shall print, in OpenAI's format, or None.
        template_kwargs: options of the chat template that this row sets itself.
    """

    prompt: list[Message]
    completion: Message | None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """A row of plain text, used without a template; ``completion`` is None for a bare prompt."""

    prompt: str
    completion: str | None


def read_row(where: str, row: dict[str, Any], options: DataArguments) -> Conversation | PlainText:
    """Return a row as a conversation or plain text.

    Args:
        where: file and line, or row number, for messages.

    Raises:
        DatasetError: names the row and the column that cannot be read.
    """
    form = form_of(row, options)
    if form is None:
        raise DatasetError(
            f"{where}: neither messages nor {options.prompt_column!r}; the row has "
            f"{sorted(row)}.{_suggestion(options.prompt_column, row)} Name the columns with "
            "--prompt_column and --completion_column"
        )
    if form == "prompt":
        prompt, completion = _read_prompt(where, row, options)
        if isinstance(prompt, str):
            for column in (*_TEMPLATE_COLUMNS, "system"):
                if row.get(column) and (
                    column == "system" or _read_template_column(where, row, column)
                ):
                    raise DatasetError(
                        f"{where}: the column {column} is for a chat template, which a prompt of "
                        "plain text does not go through; give messages"
                    )
            assert completion is None or isinstance(completion, str)
            return PlainText(prompt, completion)
    elif form == "instruction":
        prompt, completion = _read_instruction(where, row, options)
    else:
        prompt, completion = _read_messages(where, row, form)
    assert not isinstance(completion, str)
    _check_near_columns(where, row)
    tools = _read_template_column(where, row, "tools")
    kwargs = _read_template_column(where, row, "chat_template_kwargs")
    return Conversation(prompt, completion, tools or None, kwargs or {})


def _check_near_columns(where: str, row: Mapping[str, Any]) -> None:
    """Refuse a column that looks like a misspelt ``tools`` or ``chat_template_kwargs``.

    Raises:
        DatasetError: names the column and the nearest known one.
    """
    for column, value in row.items():
        structured = isinstance(value, list | dict) or str(value).lstrip()[:1] in ("[", "{")
        if not value or not structured or column in _TEMPLATE_COLUMNS:
            continue
        near = nearest(column, _TEMPLATE_COLUMNS, cutoff=0.8)
        meant = "tools" if column == "functions" else near
        if meant:
            raise DatasetError(
                f"{where}: nothing reads the column {column!r}; did you mean {meant!r}?"
            )


def form_of(row: Mapping[str, Any], options: DataArguments) -> Form | None:
    """Return the format in which a row is read; None if it has no column of any format."""
    if row.get("messages") is not None:
        return "messages"
    if row.get(options.prompt_column) is not None:
        # With --prompt_column instruction a row is still Alpaca's: its `input` column counts.
        return "instruction" if options.prompt_column == "instruction" else "prompt"
    others: tuple[Form, ...] = ("conversations", "instruction")
    for form in others:
        if row.get(form) is not None:
            return form
    return None


def check_columns(rows: Iterable[tuple[str, Mapping[str, Any]]], options: DataArguments) -> None:
    """Refuse flags that name a column which no row uses.

    Raises:
        ConfigurationError: names the flag, the column and why it has no effect.
    """
    given = {
        flag: getattr(options, flag)
        for flag in ("prompt_column", "completion_column")
        if getattr(options, flag) != getattr(DataArguments, flag)
    }
    if not given:
        return
    columns: dict[str, None] = {}
    forms: dict[str, None] = {}
    used: set[str] = set()
    for _, row in rows:
        columns.update(dict.fromkeys(row))
        form = form_of(row, options)
        forms[form or "none"] = None
        if form == "prompt" or (form == "instruction" and "instruction" in given.values()):
            used.add("prompt_column")
        takes = form in ("prompt", "instruction")
        if takes and row.get(options.completion_column) is not None:
            used.add("completion_column")
    for flag, column in given.items():
        if flag in used:
            continue
        if column not in columns:
            raise ConfigurationError(
                f"--{flag} {column}: no row has this column; the columns are "
                f"{', '.join(columns)}.{_suggestion(column, columns)}"
            )
        held = [form for form in forms if form in ("messages", "conversations", "instruction")]
        why = f"the rows hold {' and '.join(held)}, which come first" if held else "it is empty"
        raise ConfigurationError(
            f"--{flag} {column} has no effect: {why}; drop the flag, or that column of the rows"
        )


def _suggestion(column: str, columns: Iterable[str]) -> str:
    near = nearest(column, map(str, columns))
    return f" Did you mean {near}?" if near else ""


def _read_messages(
    where: str, row: dict[str, Any], form: Form
) -> tuple[list[Message], Message | None]:
    """Return prompt and completion from the column ``messages`` or ``conversations``."""
    value = json_value(where, form, row[form])
    if form == "messages":
        messages = _check_messages(where, form, value)
    else:
        messages = _check_messages(where, form, _rename_turn_keys(where, form, value))
    messages = _with_system(where, row, messages)
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise DatasetError(f"{where}: {form} hold no turn before the assistant's")
        if messages[-2]["role"] == "assistant":
            raise DatasetError(
                f"{where}: {form} end with two turns of the assistant; join them, or give a begun "
                "answer at the end of the prompt column and its rest as the completion column"
            )
        return messages[:-1], messages[-1]
    return messages, None


def _rename_turn_keys(where: str, column: str, turns: Any) -> Any:
    """Return ShareGPT's turns with the keys ``role`` and ``content``."""
    if not isinstance(turns, list):
        return turns
    made = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or ("from" not in turn and "value" not in turn):
            made.append(turn)  # it has role and content already, or `_check_messages` refuses it
            continue
        for key in ("from", "value"):
            if not isinstance(turn.get(key), str):
                raise DatasetError(
                    f"{where}: {column}[{number}] must have {key!r} as text, and has "
                    f"{'none' if turn.get(key) is None else type(turn[key]).__name__}"
                )
        role = SPEAKERS.get(turn["from"].strip().lower())
        if role is None:
            raise DatasetError(
                f"{where}: {column}[{number}] is from {turn['from']!r}; known are "
                f"{', '.join(SPEAKERS)}"
            )
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        made.append({"role": role, "content": turn["value"], **rest})
    return made


def _with_system(where: str, row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages with the text of the ``system`` column, if any, as the first one."""
    system = _text_of(where, row, "system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        if messages[0].get("content") != system:
            raise DatasetError(
                f"{where}: the system column and the first message are two system prompts, "
                f"{one_line(repr(system), 40)} and "
                f"{one_line(repr(messages[0].get('content')), 40)}; keep one"
            )
        return messages
    return [{"role": "system", "content": system}, *messages]


def _read_instruction(
    where: str, row: dict[str, Any], options: DataArguments
) -> tuple[list[Message], Message | None]:
    """Return prompt and completion from Alpaca's columns."""
    instruction, rest = _text_of(where, row, "instruction"), _text_of(where, row, "input")
    column = options.completion_column
    if column == DataArguments.completion_column and row.get("output") is not None:
        column = "output"
    answer = _text_of(where, row, column)
    if answer == "":
        raise DatasetError(f"{where}: the {column} is empty; there is nothing to learn")
    history = row.get("history")
    history = [] if history in (None, "") else json_value(where, "history", history)
    if not isinstance(history, list):
        raise DatasetError(f"{where}: history must be a list of [question, answer] pairs")
    messages: list[Message] = []
    for number, pair in enumerate(history):
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(said, str) for said in pair)
        ):
            raise DatasetError(f"{where}: history[{number}] must be [question, answer], both text")
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    question = "\n\n".join(text for text in (instruction, rest) if text)
    messages = _with_system(where, row, [*messages, {"role": "user", "content": question}])
    return messages, None if answer is None else {"role": "assistant", "content": answer}


def _read_prompt(
    where: str, row: dict[str, Any], options: DataArguments
) -> tuple[Any, Message | str | None]:
    """Return prompt and completion from the prompt and completion columns.

    Both are messages, or both are plain text.
    """
    prompt, completion = row[options.prompt_column], row.get(options.completion_column)
    turns = _messages_in(prompt)
    if turns is not None:
        prompt, completion = turns, _messages_in(completion) or completion
    if isinstance(prompt, list):
        messages = _check_messages(where, options.prompt_column, prompt)
        messages = _with_system(where, row, messages)
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
    if options.prompt_column != "prompt":  # a renamed column is a chat dataset's: one user turn
        turn = None if completion is None else {"role": "assistant", "content": completion}
        return _with_system(where, row, [{"role": "user", "content": prompt}]), turn
    return prompt, completion


def _messages_in(value: Any) -> list[Any] | None:
    """Return the messages of a JSON text, as CSV cells hold them; None for any other value."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return None
    told = isinstance(turns, list) and all(
        isinstance(turn, dict) and "role" in turn and "content" in turn for turn in turns
    )
    return turns if told and turns else None


def _text_of(where: str, row: dict[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DatasetError(f"{where}: {column} must be text, not {type(value).__name__}")
    return value


def json_value(where: str, column: str, value: Any) -> Any:
    """Return the value, parsed where it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: {column} is text, but not valid JSON: {error}") from error


def _read_template_column(where: str, row: dict[str, Any], column: str) -> Any:
    """Return the column ``tools`` or ``chat_template_kwargs``, parsed; None where it is empty."""
    value = row.get(column)
    if value is None or value == "":
        return None
    value = json_value(where, column, value)
    if column == "tools":
        if not isinstance(value, list):
            raise DatasetError(
                f"{where}: tools must be a list of functions, or JSON text of one, not "
                f"{type(value).__name__}"
            )
        for number, tool in enumerate(value):
            if not isinstance(tool, dict):
                raise DatasetError(
                    f"{where}: tools[{number}] must be an object, not {type(tool).__name__}"
                )
    elif not isinstance(value, dict):
        raise DatasetError(
            f"{where}: chat_template_kwargs must be an object such as "
            f'{{"enable_thinking": false}}, or JSON text of one, not {type(value).__name__}'
        )
    return value


def _check_messages(where: str, column: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: {column} must be a list of at least one message")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DatasetError(f"{where}: {column}[{number}] must be an object with role, content")
        weight = message.get("weight")
        if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
            raise DatasetError(
                f"{where}: {column}[{number}] has weight {weight!r}; it may be 0, not learned, or 1"
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise DatasetError(f"{where}: {column}[{number}] has no content")
    return value
