"""A tokenizer's chat template: what it prints, and which options and turns it knows."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.errors import ConfigurationError, DatasetError
from shared.nearest import nearest
from student_trainer.data.encode import Encoder
from student_trainer.data.messages import Message

PROBE = "Qz7ProbezQ"  # a text that no template prints by itself
# Names that cannot be template variables, because `apply_chat_template` has arguments of that name.
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize")


@dataclass(frozen=True)
class TemplateOptions:
    """The inputs of a chat template beside the messages.

    Attributes:
        kwargs: variables of the template, such as ``enable_thinking``; a row's own override them.
        today: the date that the template prints as today's.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    today: datetime.date = field(default_factory=datetime.date.today)


class ChatTemplate:
    """A tokenizer's chat template with fixed options.

    Raises:
        ConfigurationError: the template does not read one of the options.
    """

    def __init__(self, encoder: Encoder, options: TemplateOptions) -> None:
        self.encoder = encoder
        self.options = options
        self._tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
        self.source = str(self._tokenizer.chat_template or "")
        self._shown: dict[str, bool] = {}
        if self.source:
            try:
                self.check_kwargs(options.kwargs)
            except DatasetError as error:
                raise ConfigurationError(f"--chat_template_kwargs: {error}") from error

    @property
    def name(self) -> str:
        """The name of the template, for messages."""
        name = self._tokenizer.name_or_path
        return f"the chat template of {name}" if name else "the chat template"

    @property
    def prints_date(self) -> bool:
        """The use of the date: True if the template prints today's."""
        return "strftime_now" in self.source

    def render(
        self,
        where: str,
        messages: Sequence[Message],
        tools: Any,
        kwargs: Mapping[str, Any],
        **options: bool,
    ) -> str:
        """Return the text that the template prints.

        Raises:
            DatasetError: the template raises an error; names the row and the error.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                strftime_now=self.options.today.strftime,
                **{**self.options.kwargs, **kwargs},
                **options,
            )
        except Exception as error:  # a template is code and may raise anything
            raise DatasetError(f"{where}: {self.name} refuses the messages: {error}") from error
        return str(text)

    def find_unprinted_turn(
        self, messages: Sequence[Message], tools: Any, kwargs: Mapping[str, Any]
    ) -> int | None:
        """Return the number of the first turn, other than the assistant's, that is not printed.

        It renders the turns with marked contents, once for all conversations of the same roles and
        keys.
        """
        marked = [
            message
            if message["role"] == "assistant"
            else {**message, "content": f"{PROBE}{number}x"}
            for number, message in enumerate(messages)
        ]
        form = [(message["role"], sorted(message)) for message in messages]
        key = json.dumps([form, tools is not None, sorted(kwargs.items())], default=str)
        if self._shown.get(key):
            return None
        try:
            text = self.render("", marked, tools, kwargs)
        except DatasetError:
            return None  # the template parses contents, so marked ones tell nothing
        for number, message in enumerate(messages):
            if message["role"] != "assistant" and f"{PROBE}{number}x" not in text:
                return number
        self._shown[key] = True
        return None

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse options that the template does not read.

        Raises:
            DatasetError: names the option, and the nearest word of the template.
        """
        words = set(re.findall(r"\b[a-z]\w+\b", self.source))
        for name in kwargs:
            if name in _RESERVED:
                raise DatasetError(f"{name!r} is not an option of the template; drop it")
            if name not in words:
                near = nearest(str(name), words)
                hint = f"; did you mean {near!r}?" if near else "; drop it"
                raise DatasetError(f"{self.name} reads no {name!r}{hint}")
