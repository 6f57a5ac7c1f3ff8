"""The requests as OpenAI and vLLM write them, with the limits of their lists and texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import GroupedMetadata
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from shared.protocol import MAX_STOP_TOKEN_IDS
from shared.unknown_fields import refuse_unknown_fields

# The most stop strings, and characters of one. OpenAI takes 4 strings, but lm-eval sends up to 7.
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_PROMPTS, MAX_MESSAGES, MAX_PARTS = 1024, 4096, 4096

Ids = NDArray[np.uint32]


class _Only(GroupedMetadata):
    """A constraint for fields that may only hold values without effect; null leaves them out."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __iter__(self) -> Iterator[object]:
        yield AfterValidator(self._check)
        yield WithJsonSchema({"enum": [*self._values, None]})

    def _check(self, value: Any) -> Any:
        if value is not None and value not in self._values:
            shown = type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.60}"
            raise ValueError(f"{shown} is not supported here; leave it out")
        return value


def _read_prompts(value: Any) -> list[str | Ids]:
    """Parse text, token ids, or a list of either."""
    items = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(items, list) or not items:
        raise ValueError("must be text, token ids, or a list of either")
    if len(items) > MAX_PROMPTS:
        raise ValueError(f"{len(items)} prompts; the limit is {MAX_PROMPTS}. Split the request")
    return [item if isinstance(item, str) else _read_ids(item) for item in items]


def _read_stops(value: Any) -> list[str]:
    """Parse text or a list of texts; null and empty text are none."""
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise ValueError("must be text, or a list of texts")
    if len(texts) > MAX_STOPS:
        raise ValueError(f"{len(texts)} stop strings; the limit is {MAX_STOPS}")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("must be text, or a list of texts")
    for text in texts:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ValueError(
                f"a stop string of {len(text)} characters; it may have 1 to {MAX_STOP_LENGTH}"
            )
    return texts


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _read_ids(value: Any) -> Ids:
    if not _are_ids(value) or not 0 <= min(value) <= max(value) < 2**32:
        raise ValueError("must be text, token ids from 0 to 2**32 - 1, or a list of either")
    return np.array(value, dtype=np.uint32)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_Prompts = Annotated[
    Any,
    BeforeValidator(_read_prompts),
    PlainSerializer(lambda prompts: [p if isinstance(p, str) else p.tolist() for p in prompts]),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                _IDS,
                {"type": "array", "items": _IDS},
            ]
        }
    ),
]
_Stops = Annotated[
    list[str],
    BeforeValidator(_read_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": MAX_STOP_LENGTH},
                {
                    "type": "array",
                    "maxItems": MAX_STOPS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                },
                {"type": "null"},
            ]
        }
    ),
]
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Positive = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
_Temperature = Annotated[float, Field(strict=True, ge=0, le=1e4, allow_inf_nan=False)]
_TokenIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, lt=2**32)]],
    Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True),
]


class _Fields(BaseModel):
    """A JSON object that is immutable; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    _unknown_fields = model_validator(mode="before")(refuse_unknown_fields)


class _Sampling(_Fields):
    """The generation options of both kinds of request; null is the default.

    Attributes:
        stop: texts that end a completion, up to 16.
        include_stop_str_in_output: whether the text goes on to the end of the stop string, or of
            the token that ended it.
    """

    model: str
    n: _Positive | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=1e4, allow_inf_nan=False)] | None = (
        None
    )
    top_p: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = None
    stop: _Stops = Field(default_factory=list)
    stop_token_ids: _TokenIds | None = None
    include_stop_str_in_output: bool = False
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    skip_special_tokens: bool = True
    user: str | None = None  # accepted for a provider's records, and ignored here

    stream: Annotated[Any, _Only(False)] = None
    stream_options: Annotated[Any, _Only()] = None
    presence_penalty: Annotated[Any, _Only(0)] = None
    frequency_penalty: Annotated[Any, _Only(0)] = None
    repetition_penalty: Annotated[Any, _Only(1)] = None
    min_p: Annotated[Any, _Only(0)] = None
    min_tokens: Annotated[Any, _Only(0)] = None
    ignore_eos: Annotated[Any, _Only(False)] = None
    logit_bias: Annotated[Any, _Only({})] = None


class CompletionRequest(_Sampling):
    """The body of `POST /v1/completions`.

    Attributes:
        prompt: text, token ids, or a list of either.
        echo: whether the text and the ``logprobs`` begin with those of the prompt.
        max_tokens: longest completion; 0 is for ``echo`` or ``prompt_logprobs`` alone.
        logprobs: log-probs of each generated token beside its own; 0 is its own alone.
        prompt_logprobs: the same of each prompt token but the first.
        add_special_tokens: whether text is tokenized with the special tokens around it.
    """

    prompt: _Prompts
    echo: bool | None = None
    max_tokens: _Count | None = None
    logprobs: _Count | None = None
    prompt_logprobs: _Count | None = None
    add_special_tokens: bool = True

    best_of: Annotated[Any, _Only(1)] = None
    suffix: Annotated[Any, _Only("")] = None


class TextPart(_Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Fields):
    """A message of a conversation."""

    role: str
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    name: str | None = None

    def to_template(self) -> dict[str, str]:
        """Return the message as chat templates read it, with the text of its parts in one."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(_Sampling):
    """The body of `POST /v1/chat/completions`.

    Attributes:
        messages: rendered with the model's own chat template, a generation prompt at the end.
        max_completion_tokens, max_tokens: longest completion; by default what the context leaves.
        logprobs: whether generated tokens come with their log-probs.
        top_logprobs: how many others beside each.
        chat_template_kwargs: for the chat template.
    """

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: _Positive | None = None
    max_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: _Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: Annotated[Any, _Only([])] = None
    tool_choice: Annotated[Any, _Only("none")] = None
    response_format: Annotated[Any, _Only({"type": "text"})] = None
    chat_template: Annotated[Any, _Only()] = None


OpenAIRequest = CompletionRequest | ChatRequest
