"""Prompt and completion of a conversation, found by rendering it with the chat template.

The prompt is what the template prints for inference under the same options. The completion is what
the student has to write after it, up to the end of the assistant's turn. It is an error if the
template does not print something that a row holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import DatasetError
from student_trainer.data.conversation import Conversation
from student_trainer.data.messages import (
    REASONING,
    Message,
    before_thoughts,
    leaves_of,
    normalise,
    reasoning_of,
    split_thoughts,
    text_of,
    with_content,
    with_text_arguments,
)
from student_trainer.data.template import PROBE, ChatTemplate

EMPTY_THOUGHT = "empty thought"
THOUGHTS_LEFT_OUT = "thoughts left out"
# The messages to the user about completions with these notes.
NOTES = {
    EMPTY_THOUGHT: "begin with an empty thought, since the rows hold none and the chat template "
    "asks for one: to learn answers alone pass the option with which the template does not think, "
    "such as --chat_template_kwargs '{\"enable_thinking\": false}'",
    THOUGHTS_LEFT_OUT: "are learned without the thoughts of their rows, since the chat template "
    "does not think under these options",
}

_OPENED = re.compile(r"<think>\s*\Z")
_CLOSED = re.compile(r"</think>\s*\Z")
_EMPTY_END = re.compile(r"<think>\s*</think>\s*\Z")
_EMPTY = re.compile(r"\A\s*(?:<think>)?\s*</think>")


@dataclass(frozen=True)
class Turn:
    """A prompt, and the assistant's turn that follows it.

    Attributes:
        prompt: text, with placeholders of the `Encoder`.
        completion: text that the student has to write. It includes the end token if the template
            prints one, and may include text after it. None where there is only a prompt.
        notes: `EMPTY_THOUGHT` where the completion begins with an empty thought that the row does
            not have; `THOUGHTS_LEFT_OUT` where the template leaves out the row's thoughts.
    """

    prompt: str
    completion: str | None
    notes: tuple[str, ...] = ()


def first_turn(template: ChatTemplate, where: str, conversation: Conversation) -> Turn:
    """Return a conversation's prompt and completion.

    Args:
        template: prints the conversation.
        where: file and line, or row number, for messages.
        conversation: prompt and completion as messages.

    Raises:
        DatasetError: prompt and completion cannot be told apart, or the template does not print
            something of the row; names the row and the reason.
    """
    if not template.source:
        raise DatasetError(
            f"{where}: the row is a conversation but the tokenizer has no chat template; pass "
            "--chat_template FILE, or give prompt and completion as plain text"
        )
    try:
        template.check_kwargs(conversation.template_kwargs)
    except DatasetError as error:
        raise DatasetError(f"{where}: chat_template_kwargs: {error}") from error
    return _RenderedRow(template, where, conversation).turn()


def token_after(
    template: ChatTemplate, where: str, conversation: Conversation, turn: Turn
) -> int | None:
    """Return the control token that the template prints after a turn if another turn follows.

    Some templates print no end of a turn: the first token of the next turn ends it.
    """
    behind = _RenderedRow(template, where, conversation).text_after(turn).lstrip()
    tokens = template.encoder.control_tokens
    found = next((token for token in tokens if behind.startswith(token)), None)
    tokenizer = template.encoder.tokenizer
    return None if found is None else int(tokenizer.convert_tokens_to_ids(found))


class _RenderedRow:
    """The rendering of one conversation: it finds prompt and completion and checks both."""

    def __init__(self, template: ChatTemplate, where: str, conversation: Conversation) -> None:
        self.template = template
        self.where = where
        self.kwargs = conversation.template_kwargs
        protect = template.encoder.protect
        given = list(conversation.prompt)
        self.continues = given[-1]["role"] == "assistant"
        self._protected_completion = protect(conversation.completion or {})
        self.last = None
        if conversation.completion is not None:
            self.last = dict(conversation.completion)
            if self.continues:
                self.last = self._merge_beginning(given.pop(), self.last)
            given.append(self.last)
        messages = normalise(where, given, template.source)
        self.tools = conversation.tools
        self.given: list[Message] = protect(messages)
        self.protected_tools = protect(self.tools)
        if self.given != messages or self.protected_tools != self.tools:
            # The template must accept the original text too: placeholders hide what it refuses.
            self._try_variants(messages, self.tools, check=False)

    def _merge_beginning(self, begun: Message, completion: Message) -> Message:
        """Return one assistant turn made of a prompt's begun answer and the completion."""
        self.begun = begun
        if reasoning_of(completion) is not None or begun.get("tool_calls"):
            raise DatasetError(
                f"{self.where}: the prompt ends with the beginning of an answer, which the "
                "completion goes on with: it can have no thoughts of its own, nor can the "
                "beginning have tool calls"
            )
        content = f"{begun.get('content') or ''}{completion.get('content') or ''}"
        return {**begun, **completion, "content": content}

    def turn(self) -> Turn:
        """Return the conversation's prompt and completion, checked.

        Raises:
            DatasetError: as in `first_turn`.
        """
        messages, whole = self._try_variants(self.given, self.protected_tools)
        history = messages if self.last is None else messages[:-1]
        if self.continues:
            if self.last is not None:
                history = [*history, self._normalised_beginning()]
            prompt = self._render(history, continue_final_message=True)
        else:
            prompt = self._render(history, add_generation_prompt=True)
        self._check_tools(prompt, history)
        if self.last is None:
            return Turn(prompt, None)
        completion, notes = self._completion(prompt, whole, messages)
        self._check_learned(completion, notes)
        return Turn(prompt, completion, notes)

    def text_after(self, turn: Turn) -> str:
        """Return the text that is printed after the last turn if another turn follows.

        It is empty if the template allows no further turn.
        """
        *history, last = self.given
        calls = "tool_calls" in last
        if not calls:  # templates may drop the turn's thought once another turn follows
            last = {**last, "content": PROBE}
        following = {"role": "tool" if calls else "user", "content": "x"}
        try:
            _, text = self._try_variants(
                [*history, last, following], self.protected_tools, check=False
            )
        except DatasetError:
            return ""
        return text.partition(f"{turn.prompt}{turn.completion}" if calls else PROBE)[2]

    def _normalised_beginning(self) -> Message:
        [message] = normalise(self.where, [self.begun], self.template.source)
        return dict(self.template.encoder.protect(message))

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        return self.template.render(
            self.where, messages, self.protected_tools, self.kwargs, **options
        )

    def _try_variants(
        self, messages: list[Message], tools: Any, *, check: bool = True
    ) -> tuple[list[Message], str]:
        """Return the first variant of the messages that the template prints whole, and the text.

        Raises:
            DatasetError: there is none; the error of the first variant.
        """
        first_error: DatasetError | None = None
        for variant in _variants(messages):
            try:
                text = self.template.render(self.where, variant, tools, self.kwargs)
                if check:
                    self._check_printed(variant, text)
            except DatasetError as error:
                first_error = first_error or error
            else:
                return variant, text
        assert first_error is not None
        raise first_error

    def _check_printed(self, messages: list[Message], text: str) -> None:
        """Refuse a text in which a turn or a tool call is missing.

        Raises:
            DatasetError: names the row and the turn.
        """
        hidden = self.template.find_unprinted_turn(messages, self.protected_tools, self.kwargs)
        for number, message in enumerate(messages):
            place = f"{self.where}: messages[{number}]"
            content = message.get("content") or ""
            if message["role"] == "assistant":
                before = before_thoughts(content)
                if not _prints(text, before):
                    raise DatasetError(
                        f"{place}: {self.template.name} drops what stands before <think>, "
                        f"{before.strip()[:40]!r}; put the thought first, or drop one of them"
                    )
                content = "" if "tool_calls" in message else split_thoughts(content)[1]
            if number == hidden or not _prints(text, content):
                raise DatasetError(
                    f"{place}: {self.template.name} does not print this turn of the role "
                    f"{message['role']!r}; give it another role, or another --chat_template"
                )
            for call in message.get("tool_calls", ()):
                self._check_call(place, call["function"], text)
        if "None" in text and "None" not in self.template.source:
            given = json.dumps([messages, self.protected_tools, dict(self.kwargs)], default=str)
            if "None" not in given:
                raise DatasetError(
                    f"{self.where}: {self.template.name} prints 'None' for a turn without content"
                )

    def _check_call(self, place: str, function: Mapping[str, Any], text: str) -> None:
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        written_out = repr(arguments) in text and repr(arguments) not in (
            json.dumps(arguments), json.dumps(arguments, ensure_ascii=False),
        )  # fmt: skip
        leaves = [function["name"], *leaves_of(arguments)]
        missing = next((leaf for leaf in leaves if not _prints(text, leaf)), None)
        if (written_out and arguments) or missing is not None:
            raise DatasetError(
                f"{place}: {self.template.name} does not print the call of "
                f"{function['name']!r} with its arguments; leave tool_calls out, or give another "
                "--chat_template"
            )

    def _check_tools(self, prompt: str, history: list[Message]) -> None:
        if not self.tools:
            return
        options = {"continue_final_message" if self.continues else "add_generation_prompt": True}
        bare = self.template.render(self.where, history, None, self.kwargs, **options)
        if prompt == bare:
            raise DatasetError(
                f"{self.where}: {self.template.name} prints no tools; drop the column tools, or "
                "give another --chat_template"
            )
        for tool in self.protected_tools:
            function = tool.get("function", tool)
            parameters = function.get("parameters") or {}
            names = [str(function.get("name")), *(parameters.get("properties") or {})]
            if not all(_prints(prompt, name) for name in names):
                raise DatasetError(
                    f"{self.where}: {self.template.name} does not print the tool {names[0]!r}; "
                    "drop the column tools, or give another --chat_template"
                )

    def _completion(
        self, prompt: str, whole: str, messages: list[Message]
    ) -> tuple[str, tuple[str, ...]]:
        """Return the text to learn after the prompt, in the prompt's mode of thinking, and notes.

        Raises:
            DatasetError: it cannot be told from the rendered conversation.
        """
        inline, answer = split_thoughts(messages[-1].get("content") or "")
        field = reasoning_of(self._protected_completion)
        thoughts = inline if field is None else field
        completion = whole[len(prompt) :] if whole.startswith(prompt) else None
        if completion is None and len(messages) > 1:
            completion = _text_after_shared_end(prompt, whole, messages[-2].get("content") or "")
        if (
            inline is not None
            and completion is not None
            and self._misreads_thought(completion, prompt)
        ):
            completion = None  # the template printed the thought as part of the answer
        if completion is None and _CLOSED.search(prompt):
            completion = self._without_thoughts(prompt, messages, answer)
            if completion is not None and thoughts:
                return completion, (THOUGHTS_LEFT_OUT,)
        elif completion is None:
            completion = self._with_thought_field(prompt, messages, thoughts or "", answer)
            if completion is None and _OPENED.search(prompt):
                completion = self._compose_thought(prompt, whole, field, inline, answer)
        if completion is None:
            raise DatasetError(
                f"{self.where}: the conversation that {self.template.name} prints with the last "
                f"turn does not begin with the prompt, which ends with {prompt[-40:]!r}: what is "
                "learned cannot be told from it. Give other --chat_template_kwargs or another "
                "--chat_template, or prompt and completion as plain text"
            )
        if inline is not None and inline.strip() and not _prints(completion, inline):
            return completion, (THOUGHTS_LEFT_OUT,)
        is_empty = thoughts is None and _EMPTY.match(completion)
        return completion, ((EMPTY_THOUGHT,) if is_empty else ())

    def _misreads_thought(self, completion: str, prompt: str) -> bool:
        """Return whether the template prints a thought in the content twice, or as the answer."""
        if _CLOSED.search(prompt) or _EMPTY.match(completion):
            return "</think>" in _EMPTY.sub("", completion, count=1)
        return bool(self._fields()) and "<think>" not in self.template.source

    def _fields(self) -> list[str]:
        """Return the keys under which the template reads thoughts."""
        return [n for n in REASONING if re.search(rf"\b{n}\b", self.template.source)]

    def _without_thoughts(self, prompt: str, messages: list[Message], answer: str) -> str | None:
        """Return the completion without thoughts, or None if it does not follow the prompt."""
        bare = {key: value for key, value in messages[-1].items() if key not in REASONING}
        if bare.get("content"):
            bare["content"] = answer.lstrip("\n")
        text = self._render([*messages[:-1], bare])
        # Some templates end the prompt with an empty thought that they do not print in the turn.
        for shown in (prompt, _EMPTY_END.sub("", prompt)):
            if text.startswith(shown):
                return text[len(shown) :]
        return None

    def _with_thought_field(
        self, prompt: str, messages: list[Message], thoughts: str, answer: str
    ) -> str | None:
        """Return the completion of a template that prints thoughts from a key of the message."""
        probe = {**messages[-1], **dict.fromkeys(self._fields(), PROBE)}
        if probe.get("content"):
            probe["content"] = answer.lstrip("\n")
        text = self._render([*messages[:-1], probe])
        before, found, behind = text.rpartition(PROBE)
        if not found or not before.startswith(prompt):
            return None
        return before[len(prompt) :] + thoughts.strip("\n") + behind

    def _compose_thought(
        self, prompt: str, whole: str, field: str | None, inline: str | None, answer: str
    ) -> str | None:
        """Return the completion where the prompt opens a thought but the template prints none."""
        opened = _OPENED.search(prompt)
        assert opened is not None
        if not whole.startswith(prompt[: opened.start()]):
            return None
        printed = _EMPTY.sub("", whole[opened.start() :]).lstrip("\n")
        if not printed.startswith(answer.strip()):
            return None
        end = printed[len(answer.strip()) :]
        line = opened[0].removeprefix("<think>")  # templates differ in the newlines around thoughts
        space = line * 2
        thoughts = (field or "").strip("\n") + line
        if field is None and inline is not None:
            space = answer[: len(answer) - len(answer.lstrip())]
            thoughts = inline.removeprefix(line)
        return f"{thoughts}</think>{space}{answer.strip()}{end}"

    def _check_learned(self, completion: str, notes: tuple[str, ...]) -> None:
        last = self._protected_completion
        thoughts = reasoning_of(last)
        if thoughts and THOUGHTS_LEFT_OUT not in notes and not _prints(completion, thoughts):
            raise DatasetError(
                f"{self.where}: {self.template.name} does not print the thoughts of the last turn; "
                f"drop {REASONING[0]}, or give another --chat_template"
            )
        answer = split_thoughts(text_of(self.where, last.get("content")) or "")[1]
        if not _prints(completion, answer):
            raise DatasetError(
                f"{self.where}: {self.template.name} does not print the content of the last turn, "
                f"{answer.strip()[:40]!r}, behind the prompt"
            )
        if not answer.strip() and not thoughts and not last.get("tool_calls"):
            raise DatasetError(f"{self.where}: the completion is empty; there is nothing to learn")


def _text_after_shared_end(prompt: str, whole: str, content: str) -> str | None:
    """Return the text after the prompt's end in ``whole``, where only earlier turns differ.

    Templates drop an earlier turn's thoughts once there is an answer. The shared end must hold more
    than the last turn's ``content``, and must occur in ``whole`` once; else the result is None.
    """
    short, long = 0, len(prompt)  # a binary search for the length of the longest shared end
    while short < long:
        middle = (short + long + 1) // 2
        if prompt[-middle:] in whole:
            short = middle
        else:
            long = middle - 1
    end = prompt[len(prompt) - short :]
    told = content.strip()
    if not told or not _prints(end, told) or prompt.endswith(told) or whole.count(end) != 1:
        return None
    return whole.partition(end)[2]


def _variants(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages with tool calls in each format of templates, the usual one first."""
    calls = any("tool_calls" in message for message in messages)
    forms = [messages, with_text_arguments(messages)] if calls else [messages]
    for form in forms:
        yield with_content(form, of_calls="")
        if calls:
            yield with_content(form, of_calls=None)
            yield with_content(form, of_calls="missing")


def _prints(text: str, value: str) -> bool:
    """Return whether the text holds ``value``: as it is, as JSON, or as a Python constant."""
    wanted = value.strip()
    forms = (wanted, json.dumps(wanted)[1:-1], json.dumps(wanted, ensure_ascii=False)[1:-1])
    constants = {"true": "True", "false": "False", "null": "None"}
    return any(form in text for form in (*forms, constants.get(wanted, wanted)))


def describe_mode(template: ChatTemplate, prompt: str) -> str:
    """Return a description of the prompt's mode of thinking: it opens or closes a thought."""
    if not any(word in template.source for word in ("<think>", *REASONING)):
        return "without thoughts"
    if _OPENED.search(prompt):
        return "thinking: the prompt opens a thought"
    if _CLOSED.search(prompt):
        return "not thinking: the prompt closes an empty thought"
    return "the prompt leaves open whether the answer begins with a thought"
