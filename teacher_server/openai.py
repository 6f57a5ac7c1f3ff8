"""OpenAI-style requests and answers, for clients that speak nothing else.

A request becomes the same jobs that `/v1/score` and `/v1/generate` make, under the same limits; a
field that this server cannot honour is refused, never ignored. Beyond OpenAI's own fields those of
vLLM are spoken that teachers are asked with: ``prompt_logprobs``, ``top_k``, ``stop_token_ids``,
``include_stop_str_in_output``, ``return_token_ids``, ``return_tokens_as_token_ids``,
``add_special_tokens``.

The text of a completion is what it adds to that of its prompt, up to what ended it: without the
stop string or stop token, unless ``include_stop_str_in_output`` is set. ``token_ids`` and
``logprobs`` are of all tokens generated, the last of a stop string included.

Log-probs are those of the model at temperature 1 over the whole vocabulary, as vLLM gives them.
All of it is JSON, some 70 bytes a log-prob: for scoring `/v1/score` is the better call.

Source: the API references of OpenAI and, for the extensions, of vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from shared.errors import InvalidRequestError, NotFoundError, ProtocolError
from shared.protocol import (
    MAX_STOP_TOKEN_IDS,
    Completion,
    GenerateRequest,
    InfoResponse,
    ScoreRequest,
    ScoreSequence,
)
from shared.sparse import SparseLogprobs
from shared.text import StopStrings, completion_text, decoded, token_text
from shared.unknown_fields import refuse_unknown_fields
from shared.validation import check_generate_request, check_score_request
from teacher_server.backends.checkpoint import load_tokenizer

# Each is some 300 bytes while the answer is made, and 70 in it.
MAX_LOGPROBS = 1 << 20
# Stop strings, and characters of one. OpenAI takes 4; tasks of lm-eval have 6 and an end token.
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_PROMPTS, MAX_MESSAGES, MAX_PARTS = 1024, 4096, 4096
# Characters of a prompt for each token of the context: more is refused before it is tokenized.
MAX_CHARACTERS_PER_TOKEN = 16
# Characters of a long text that are tokenized at a time, to see whether all of it is worth it.
_PIECE = 1 << 15
# Items of a list that are written as JSON at a time: meanwhile no other thread runs.
_WRITTEN_ITEMS = 1024
# JSON has no −inf.
_LOWEST = -9999.0

Ids = NDArray[np.uint32]


class _Only(GroupedMetadata):
    """For a field that is understood and can say only what is done anyway; null is left out."""

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
    """Text, token ids, or a list of either."""
    items = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(items, list) or not items:
        raise ValueError("must be text, token ids, or a list of either")
    if len(items) > MAX_PROMPTS:
        raise ValueError(f"{len(items)} prompts; the limit is {MAX_PROMPTS}. Split the request")
    return [item if isinstance(item, str) else _read_ids(item) for item in items]


def _read_stops(value: Any) -> list[str]:
    """Text or a list of texts; null and empty text are none."""
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
    """What is JSON of ours: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    _unknown_fields = model_validator(mode="before")(refuse_unknown_fields)


class _Sampling(_Fields):
    """What both kinds of request say of how to generate; null is the default.

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
    user: str | None = None  # for a provider's records; nothing here depends on it

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
    """`POST /v1/completions`.

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
        """As chat templates read it, with the text of its parts in one."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(_Sampling):
    """`POST /v1/chat/completions`.

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


Asked = CompletionRequest | ChatRequest


@dataclass(frozen=True)
class Work:
    """A request as jobs.

    Attributes:
        prompts: token ids of each prompt, [P] each.
        echo: whether the answer begins with the prompt.
        logprobs: log-probs of each generated token beside its own; None for none.
        prompt_logprobs: the same of each prompt token.
        score: what gives the log-probs of prompts: every prompt that has a row, or None.
        generate: what gives the completions, or None.
        stop: texts that end them, or None.
    """

    asked: Asked
    prompts: list[Ids]
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    score: ScoreRequest | None
    generate: GenerateRequest | None
    stop: StopStrings | None


class _Json(str):
    """JSON that is written already: of a million log-probs, a million maps would be left."""


# Tokens [T] and their rows; None where there are none.
_Part = tuple[Ids, SparseLogprobs | None]


@dataclass(frozen=True)
class _Echo:
    """What of a prompt comes before each of its completions."""

    text: str
    parts: list[_Part]


class Speaker:
    """Text <-> token ids of one model, and requests <-> jobs.

    The tokenizer is read at the first request: most servers never see one.
    """

    def __init__(self, model: str, *, trust_remote_code: bool) -> None:
        self._model = model
        self._trust_remote_code = trust_remote_code
        self.token = functools.lru_cache(maxsize=1 << 18)(self._decode_one)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._model, trust_remote_code=self._trust_remote_code)

    def _decode_one(self, token_id: int) -> str:
        return token_text(self.tokenizer, token_id)

    def plan(self, asked: Asked, info: InfoResponse) -> Work:
        """The jobs of a request.

        Raises:
            NotFoundError: another model is asked for.
            InvalidRequestError: what the teacher of ``info`` cannot do; names the field.
        """
        check_model(asked.model, info)
        for text in asked.stop:
            _check_text(text, "stop")
        if isinstance(asked, ChatRequest):
            prompts, source = [self._render(asked, info)], "messages"
            logprobs, prompt_logprobs, echo = _chat_logprobs(asked), None, False
            max_tokens = asked.max_completion_tokens or asked.max_tokens
            if max_tokens is None:
                max_tokens = max(1, info.max_model_len - len(prompts[0]))
        else:
            prompts, source = self._encode_all(asked, info), "prompt"
            logprobs, prompt_logprobs = asked.logprobs, asked.prompt_logprobs
            echo = bool(asked.echo)
            max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
        n = asked.n or 1
        echoed = logprobs if echo else None
        entries = sum(len(ids) for ids in prompts) * (_width(prompt_logprobs) + _width(echoed))
        entries += len(prompts) * max_tokens * _width(logprobs)
        if entries * n > MAX_LOGPROBS:
            raise InvalidRequestError(
                f"{entries * n} log-probs; the limit in JSON is {MAX_LOGPROBS}. Split the request, "
                "or use /v1/score",
                field="logprobs" if prompt_logprobs is None else "prompt_logprobs",
            )
        generate = score = None
        if max_tokens > 0:
            generate = _generate_request(asked, prompts, max_tokens, logprobs, info, source)
        else:
            _check_nothing_generated(n, prompts, prompt_logprobs, echo)
        if prompt_logprobs is not None and asked.temperature not in (None, 0, 1):
            raise InvalidRequestError(
                f"temperature {asked.temperature}: prompt_logprobs are at temperature 1, and "
                "only the token generated after them would be at another; use 1 or 0, or "
                "/v1/score, which applies a temperature",
                field="temperature",
            )
        scored = [k for k in (prompt_logprobs, echoed) if k is not None]
        # Without a completion, scoring is also what checks the prompt.
        if scored or generate is None:
            score = _score_request(prompts, max(scored, default=0), info)
        stop = StopStrings(tuple(asked.stop), asked.skip_special_tokens) if asked.stop else None
        return Work(asked, prompts, echo, logprobs, prompt_logprobs, score, generate, stop)

    def answer(
        self,
        work: Work,
        scored: Sequence[SparseLogprobs],
        completions: Sequence[Completion],
        info: InfoResponse,
        request_id: str,
    ) -> bytearray:
        """The JSON of an answer.

        Args:
            work: from `plan`.
            scored: of ``work.score``, in order.
            completions: of ``work.generate``, n of each prompt, in order.
            info: the teacher.
            request_id: part of the answer's id.
        """
        asked, n = work.asked, work.asked.n or 1
        if work.generate is None:
            nothing = Completion(token_ids=np.zeros(0, np.uint32), finish_reason="length")
            completions = [nothing] * (len(work.prompts) * n)
        rows = iter(scored)
        choices: list[dict[str, Any]] = []
        for number, prompt in enumerate(work.prompts):
            one = next(rows) if work.score is not None and len(prompt) > 1 else None
            prompt_rows = None
            if work.prompt_logprobs is not None:
                prompt_rows = self._prompt_rows(prompt, one, work.prompt_logprobs)
            echo = self._echo(work, number, one) if work.echo else None
            for completion in completions[number * n : (number + 1) * n]:
                ended = self._ended(work, prompt, completion, info)
                index = len(choices)
                choices.append(
                    self._choice(work, index, prompt, completion, prompt_rows, echo, ended)
                )
        generated = sum(len(completion.token_ids) for completion in completions)
        prompt_tokens = sum(len(prompt) for prompt in work.prompts)
        chat = isinstance(asked, ChatRequest)
        body: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": info.teacher.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": generated,
                "total_tokens": prompt_tokens + generated,
            },
        }
        if chat and asked.return_token_ids:
            body["prompt_token_ids"] = work.prompts[0].tolist()
        answer = bytearray()
        for piece in _written(body):
            answer += piece.encode()
        return answer

    def _choice(
        self,
        work: Work,
        index: int,
        prompt: Ids,
        completion: Completion,
        prompt_rows: list[_Json | None] | None,
        echo: _Echo | None,
        ended: tuple[str, str, str | int | None],
    ) -> dict[str, Any]:
        asked = work.asked
        ids = completion.token_ids
        text, finish_reason, stop_reason = ended
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if isinstance(asked, ChatRequest):
            choice["message"] = {"role": "assistant", "content": text}
        else:
            text = text if echo is None else echo.text + text
            choice |= {"text": text, "prompt_logprobs": prompt_rows}
        choice["logprobs"] = None
        parts = [] if echo is None else echo.parts
        if completion.scores is not None:
            parts = [*parts, (ids, completion.scores)]
        if work.logprobs is not None and parts:
            as_ids = bool(asked.return_tokens_as_token_ids)
            write = _chat_rows if isinstance(asked, ChatRequest) else _completion_rows
            name = "token_id:{}".format if as_ids else self.token
            choice["logprobs"] = write(parts, work.logprobs, name)
        if asked.return_token_ids:
            choice["token_ids"] = ids.tolist()
            if not isinstance(asked, ChatRequest):
                choice["prompt_token_ids"] = prompt.tolist()
        return choice

    def _echo(self, work: Work, number: int, scores: SparseLogprobs | None) -> _Echo:
        """A prompt as an answer begins with it: text as it was sent, ids with special tokens."""
        assert isinstance(work.asked, CompletionRequest)
        text, ids = work.asked.prompt[number], work.prompts[number]
        if not isinstance(text, str):
            text = decoded(self.tokenizer, ids, skip_special_tokens=False)
        parts: list[_Part] = [(ids[:1], None)]  # nothing comes before the first token
        return _Echo(text, parts if scores is None else [*parts, (ids[1:], scores)])

    def _ended(
        self, work: Work, prompt: Ids, completion: Completion, info: InfoResponse
    ) -> tuple[str, str, str | int | None]:
        """Text of a completion, finish reason, and vLLM's stop reason.

        That is the stop string or stop token; None for the end token and for the length limit.
        """
        asked, ids, reason = work.asked, completion.token_ids, completion.finish_reason
        text = self._text(prompt, ids, asked)
        match = None if work.stop is None else work.stop.find(text)
        if match is not None:
            start, end, stop = match
            return text[: end if asked.include_stop_str_in_output else start], "stop", stop
        last = int(ids[-1]) if len(ids) else -1
        if reason != "stop" or last not in {*info.eos_token_ids, *(asked.stop_token_ids or [])}:
            return text, reason, None
        if not asked.include_stop_str_in_output:
            text = self._text(prompt, ids[:-1], asked)
        return text, reason, None if last == self.tokenizer.eos_token_id else last

    def _text(self, prompt: Ids, ids: Ids, asked: Asked) -> str:
        skip = asked.skip_special_tokens
        return completion_text(self.tokenizer, prompt, ids, skip_special_tokens=skip)

    def _prompt_rows(
        self, prompt: Ids, scores: SparseLogprobs | None, k: int
    ) -> list[_Json | None]:
        """vLLM's ``prompt_logprobs``: the token that stands there, and the k most probable.

        The rank of a token outside the top-k is given as k + 1: it is that or more.
        """
        rows: list[_Json | None] = [None]  # nothing comes before the first token
        if scores is None:
            return rows
        for t, next_id in enumerate(prompt[1:].tolist()):
            named = {next_id: (float(scores.next_token_logprob[t]), k + 1)}
            top = zip(scores.token_ids[t].tolist(), scores.logprobs[t].tolist(), strict=True)
            for rank, (token_id, logprob) in enumerate(top, start=1):
                if rank <= k or token_id == next_id:
                    named[token_id] = (logprob, rank)
            row = {
                str(token_id): {
                    "logprob": max(logprob, _LOWEST),
                    "rank": rank,
                    "decoded_token": self.token(token_id),
                }
                for token_id, (logprob, rank) in named.items()
            }
            rows.append(_Json(json.dumps(row)))
        return rows

    def _encode_all(self, asked: CompletionRequest, info: InfoResponse) -> list[Ids]:
        texts = [prompt for prompt in asked.prompt if isinstance(prompt, str)]
        for text in texts:
            _check_length(len(text), info.max_model_len, "context", "prompt")
        _check_length(sum(map(len, texts)), info.limits.max_tokens, "request", "prompt")
        for text in texts:
            _check_text(text, "prompt")
        return [
            self._ids(prompt, info, "prompt", asked.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in asked.prompt
        ]

    def _ids(self, text: str, info: InfoResponse, field: str, add_special_tokens: bool) -> Ids:
        """Token ids of a text.

        A long text is tokenized in pieces first, whose tokens are nearly its own: twice as many as
        the context takes are enough to refuse it.
        """
        context = info.max_model_len
        if len(text) > max(_PIECE, 2 * context):
            tokens = 0
            for start in range(0, len(text), _PIECE):
                tokens += len(self._piece(text[start : start + _PIECE], add_special_tokens=False))
                if tokens > 2 * context:
                    raise InvalidRequestError(
                        f"over {context} tokens; the teacher's context is {context}", field=field
                    )
        return np.array(self._piece(text, add_special_tokens), dtype=np.uint32)

    def _piece(self, text: str, add_special_tokens: bool) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_attention_mask=False,
            return_token_type_ids=False,
        )  # fmt: skip
        ids: list[int] = encoded["input_ids"]
        return ids

    def _render(self, asked: ChatRequest, info: InfoResponse) -> Ids:
        apply = self.tokenizer.apply_chat_template
        options = asked.chat_template_kwargs or {}
        reserved = sorted(options.keys() & inspect.signature(apply).parameters.keys())
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs {reserved[0]!r} is not the template's to read",
                field="chat_template_kwargs",
            )
        messages = [message.to_template() for message in asked.messages]
        characters = sum(len(text) for message in messages for text in message.values())
        _check_length(characters, info.max_model_len, "context", "messages")
        try:
            text = apply(messages, add_generation_prompt=True, tokenize=False, **options)
        except Exception as error:  # whatever the checkpoint's template raises
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        _check_length(len(text), info.max_model_len, "context", "messages")
        _check_text(text, "messages")
        return self._ids(text, info, "messages", add_special_tokens=False)


def _check_text(text: str, field: str) -> None:
    """Raises `InvalidRequestError` for what JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{text[error.start]!r} is half a character: a surrogate without its other half",
            field=field,
        ) from None


def _check_length(characters: int, tokens: int, of: str, field: str) -> None:
    """Raises `InvalidRequestError` for a text that is not worth tokenizing."""
    limit = tokens * MAX_CHARACTERS_PER_TOKEN
    if characters > limit:
        raise InvalidRequestError(
            f"{characters} characters; the limit is {limit}, {MAX_CHARACTERS_PER_TOKEN} for each "
            f"of the {tokens} tokens of the {of}. Shorten the text, or send token ids",
            field=field,
        )


def check_model(name: str, info: InfoResponse) -> None:
    """Raises `NotFoundError` for a model that is not the one served."""
    if name != info.teacher.model:
        raise NotFoundError(
            f"the model {name!r:.200} is not served here; {info.teacher.model!r} is", field="model"
        )


def model_card(info: InfoResponse) -> dict[str, Any]:
    """The served model, as `/v1/models` lists it; ``max_model_len`` is vLLM's addition."""
    return {
        "id": info.teacher.model,
        "object": "model",
        "created": 0,
        "owned_by": "sparse-gkd",
        "root": info.teacher.model,
        "parent": None,
        "max_model_len": info.max_model_len,
    }


def error_body(error: ProtocolError) -> bytes:
    """OpenAI's error object."""
    body = {
        "message": error.detail,
        "type": error.slug(),
        "param": error.field,
        "code": error.status,
    }
    return json.dumps({"error": body}).encode()


def _written(value: Any) -> Iterator[str]:
    """``value`` as JSON in small pieces: json's own loop lets no other thread run."""
    if isinstance(value, _Json):
        yield value
    elif isinstance(value, dict):
        before = "{"
        for name, item in value.items():
            yield f"{before}{json.dumps(name)}: "
            yield from _written(item)
            before = ", "
        yield "}" if value else "{}"
    elif isinstance(value, list) and any(isinstance(item, dict | _Json) for item in value):
        before = "["
        for item in value:
            yield before
            yield from _written(item)
            before = ", "
        yield "]"
    elif isinstance(value, list) and len(value) > _WRITTEN_ITEMS:
        before = "["
        for start in range(0, len(value), _WRITTEN_ITEMS):
            yield before + json.dumps(value[start : start + _WRITTEN_ITEMS])[1:-1]
            before = ", "
        yield "]"
    else:
        yield json.dumps(value)


def _width(logprobs: int | None) -> int:
    """Log-probs of a row in the answer."""
    return 0 if logprobs is None else logprobs + 1


def _check_nothing_generated(
    n: int, prompts: list[Ids], prompt_logprobs: int | None, echo: bool
) -> None:
    """Raises `InvalidRequestError` where ``max_tokens`` 0 leaves nothing to answer."""
    if prompt_logprobs is None and not echo:
        raise InvalidRequestError(
            "max_tokens 0 asks for nothing without prompt_logprobs or echo", field="max_tokens"
        )
    if n > 1:
        raise InvalidRequestError(f"n {n} of nothing: max_tokens is 0", field="n")
    for index, ids in enumerate(prompts):
        if len(ids) < 2:
            raise InvalidRequestError(
                f"a prompt of {len(ids)} tokens has no row to score, and max_tokens is 0",
                field=f"prompt.{index}",
            )


def _chat_logprobs(asked: ChatRequest) -> int | None:
    if asked.logprobs:
        return asked.top_logprobs or 0
    if asked.top_logprobs:
        raise InvalidRequestError(
            f"top_logprobs {asked.top_logprobs} has no effect without logprobs true",
            field="top_logprobs",
        )
    return None


def _score_request(prompts: list[Ids], k: int, info: InfoResponse) -> ScoreRequest | None:
    long = [ids for ids in prompts if len(ids) > 1]
    if not long:
        return None
    request = ScoreRequest(
        sequences=[ScoreSequence(token_ids=ids, completion_start=1) for ids in long],
        top_k=max(1, k),
    )
    with _named({"sequences": "prompt", "top_k": "prompt_logprobs"}):
        check_score_request(request, info)
    return request


def _generate_request(
    asked: Asked,
    prompts: list[Ids],
    max_tokens: int,
    logprobs: int | None,
    info: InfoResponse,
    source: str,
) -> GenerateRequest:
    request = GenerateRequest(
        prompts=prompts,
        n=asked.n or 1,
        max_new_tokens=max_tokens,
        temperature=1.0 if asked.temperature is None else float(asked.temperature),
        top_p=1.0 if asked.top_p is None else float(asked.top_p),
        sampling_top_k=max(0, asked.top_k or 0),
        seed=asked.seed,
        stop_token_ids=np.array(asked.stop_token_ids or [], dtype=np.uint32),
        top_k=None if logprobs is None else max(1, logprobs),
    )
    top = "top_logprobs" if isinstance(asked, ChatRequest) else "logprobs"
    with _named({"prompts": source, "top_k": top}):
        check_generate_request(request, info)
    return request


@contextlib.contextmanager
def _named(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals name the fields of the request that was sent, not of the one made from it."""
    try:
        yield
    except InvalidRequestError as error:
        first, *rest = (error.field or "").split(".")
        error.field = ".".join([names.get(first, first), *rest[:1]])
        raise


def _completion_rows(parts: Sequence[_Part], k: int, name: Any) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of a completion, or of an echoed prompt and its completion.

    A token has the same value in both lists. Of several tokens that read alike, which are one key,
    the most probable one counts: the largest value of a row is that of its most probable token.
    """
    tokens: list[str] = []
    own: list[float | None] = []
    top: list[_Json | None] = []
    for ids, scores in parts:
        tokens += [name(token_id) for token_id in ids.tolist()]
        if scores is None:
            own += [None] * len(ids)
            top += [None] * len(ids)
            continue
        following = zip(ids.tolist(), scores.next_token_logprob.tolist(), strict=True)
        for (token_id, logprob), row in zip(following, _top(scores, k), strict=True):
            value = dict(row).get(token_id, max(logprob, _LOWEST))
            named = {name(token_id): value}
            for i, other in row:
                named[name(i)] = max(other, named.get(name(i), other))
            own.append(value)
            top.append(_Json(json.dumps(named)))
    offsets = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def _chat_rows(parts: Sequence[_Part], k: int, name: Any) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of a chat completion."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = name(token_id)
        return {"token": token, "logprob": max(logprob, _LOWEST), "bytes": list(token.encode())}

    ((ids, scores),) = parts  # a chat echoes nothing
    assert scores is not None
    own = scores.next_token_logprob.tolist()
    return {
        "content": [
            _Json(json.dumps({**entry(i, logprob), "top_logprobs": [entry(*pair) for pair in row]}))
            for i, logprob, row in zip(ids.tolist(), own, _top(scores, k), strict=True)
        ]
    }


def _top(scores: SparseLogprobs, k: int) -> Iterator[list[tuple[int, float]]]:
    """The k most probable (id, log-prob) of each row; k may be 0, which no engine is asked for."""
    rows = zip(scores.token_ids[:, :k].tolist(), scores.logprobs[:, :k].tolist(), strict=True)
    for ids, logprobs in rows:
        clamped = [max(value, _LOWEST) for value in logprobs]
        yield list(zip(ids, clamped, strict=True))
