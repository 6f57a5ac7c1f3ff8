"""The conversion of messages in OpenAI's format into the forms that chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shared.errors import DatasetError
from shared.nearest import nearest

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys under which templates read an assistant's thoughts.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys of messages in OpenAI's format.
KEYS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "weight",
    *REASONING,
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT = re.compile(r"\A(.*?)</think>", re.DOTALL)


def normalise(where: str, messages: Sequence[Message], template: str) -> list[Message]:
    """Return the messages with text contents, known roles and tool calls in one format.

    Parts of text become one text. A developer's turn is a system turn where the template knows no
    developer, as in OpenAI's API. Thoughts are put under every key that the template reads.

    Args:
        where: file and line, or row number, for messages.
        template: source of the chat template.

    Raises:
        DatasetError: a message is malformed; names the row and the message.
    """
    return [
        _normalised(f"{where}: messages[{number}]", message, template)
        for number, message in enumerate(messages)
    ]


def _normalised(where: str, message: Message, template: str) -> Message:
    role = message["role"]
    made = {key: value for key, value in message.items() if value is not None and key != "content"}
    named = re.search(rf"['\"]{re.escape(role)}['\"]", template)
    if role == "developer" and not named:
        made["role"] = "system"
    elif role not in ROLES and not named:
        raise DatasetError(
            f"{where} has the role {role!r}, which the chat template does not know; roles are "
            f"{', '.join(ROLES)}"
        )
    if "function_call" in made:
        raise DatasetError(f"{where} has a function_call, OpenAI's old form; give tool_calls")
    if not made.get("tool_calls", True):
        del made["tool_calls"]  # some templates test only whether the key exists
    elif "tool_calls" in made:
        if role != "assistant":
            raise DatasetError(f"{where} has tool_calls, but its role is {role!r}")
        made["tool_calls"] = _tool_calls(where, made["tool_calls"])
    _check_keys(where, message, template)
    thoughts = reasoning_of(message)
    for name in REASONING:
        made.pop(name, None)
        if thoughts is not None and re.search(rf"\b{name}\b", template):
            made[name] = thoughts
    made["content"] = text_of(where, message.get("content"))
    return made


def _check_keys(where: str, message: Message, template: str) -> None:
    """Refuse a message with keys that the template would not print.

    Raises:
        DatasetError: names the message and the key.
    """
    thoughts = {name: message[name] for name in REASONING if message.get(name)}
    if thoughts and message["role"] != "assistant":
        raise DatasetError(
            f"{where} has {next(iter(thoughts))}, but its role is {message['role']!r}; only an "
            "assistant thinks"
        )
    if len(set(map(str, thoughts.values()))) > 1:
        raise DatasetError(f"{where} has unlike {' and '.join(thoughts)}; keep one of them")
    for key in message:
        if key in KEYS or message[key] is None:
            continue
        if re.search(rf"(?:\.|['\"]){re.escape(key)}\b", template):  # the template reads this key
            continue
        near = nearest(key, KEYS, cutoff=0.75)
        if near:
            raise DatasetError(f"{where} has {key!r}, which nothing reads; did you mean {near!r}?")


def reasoning_of(message: Message) -> str | None:
    """Return the thoughts that a message holds under a key of their own, or None."""
    for name in REASONING:
        if isinstance(message.get(name), str):
            return str(message[name])
    return None


def before_thoughts(content: str) -> str:
    """Return the text before ``<think>`` if ``</think>`` follows, else an empty text."""
    found = _THOUGHT.match(content)
    before, tag, _ = ("", "", "") if found is None else found[1].partition("<think>")
    return before if tag else ""


def split_thoughts(content: str) -> tuple[str | None, str]:
    """Return the thoughts before ``</think>`` in a content, or None, and the answer after it."""
    found = _THOUGHT.match(content)
    if found is None:
        return None, content
    return found[1].split("<think>", 1)[-1], content[found.end() :]


def text_of(where: str, content: Any) -> str | None:
    """Return a content as one text, its parts joined.

    Raises:
        DatasetError: a part is not text.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DatasetError(
            f"{where}: content must be text or a list of parts, not {type(content).__name__}"
        )
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, Mapping) or part.get("type", "text") not in _TEXT_PARTS:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DatasetError(
                f"{where}: content[{number}] is of type {kind!r}; only parts of text can be learned"
            )
        elif not isinstance(part.get("text"), str):
            raise DatasetError(f"{where}: content[{number}] has no text")
        else:
            texts.append(part["text"])
    return "".join(texts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Return tool calls as ``{"type", "function": {"name", "arguments"}}``, arguments parsed."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DatasetError(f"{where}: tool_calls must be a list of objects")
    made = []
    for number, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DatasetError(f"{where}: tool_calls[{number}] names no function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise DatasetError(
                    f"{where}: tool_calls[{number}].arguments is not valid JSON: {error}"
                ) from error
        if not isinstance(arguments, Mapping):
            raise DatasetError(f"{where}: tool_calls[{number}].arguments must be an object")
        others = {key: value for key, value in call.items() if key not in ("name", "arguments")}
        made.append(
            {"type": "function", **others,
             "function": {"name": function["name"], "arguments": dict(arguments)}}
        )  # fmt: skip
    return made


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with tool-call arguments as JSON text, which some templates expect."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def with_content(messages: Sequence[Message], *, of_calls: str | None) -> list[Message]:
    """Return the messages with a content each.

    Args:
        of_calls: content of a tool call without one; ``"missing"`` leaves the key out.
    """
    made = []
    for message in messages:
        if message.get("content") or "tool_calls" not in message:
            made.append({**message, "content": message.get("content") or ""})
        elif of_calls == "missing":
            made.append({key: value for key, value in message.items() if key != "content"})
        else:
            made.append({**message, "content": of_calls})
    return made


def leaves_of(value: Any) -> list[str]:
    """Return all keys and scalar values of a tool call's arguments, as texts."""
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in (str(key), *leaves_of(inner))]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in leaves_of(inner)]
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
