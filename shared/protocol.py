"""The requests, answers, versions and limits of the HTTP protocol.

The models below are the wire schema of both media types: msgpack with arrays as raw buffers (see
`shared.codec`), and JSON with arrays as nested lists. Token ids travel, never text.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.arrays import TokenIds1D, TokenIds2D
from shared.sparse import SparseLogprobs
from shared.unknown_fields import refuse_unknown_fields

# A new field that may be left out keeps the version: a client sends it only where it is set and the
# server's description shows that it is known, and ignores new fields of that description. Anything
# that an older half would read wrongly is another version, and is refused.
PROTOCOL_VERSION = 1
# Float32 logits divided by less are no longer finite.
MIN_TEMPERATURE = 1e-6

LogprobDtype = Literal["float32", "float16"]
FinishReason = Literal["stop", "length"]

# The most stop tokens of a request; each of its completions carries them.
MAX_STOP_TOKEN_IDS = 1024
# Longer lists are refused before their items are read; the limits of requests are far lower.
_LONGEST_LIST = 1 << 16

# Every number fits the integers of msgpack, numpy and the engines.
_Int = Annotated[int, Field(strict=True, ge=-(2**31), lt=2**31)]
_Index = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Positive = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
_Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
_Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Temperature = Annotated[float, Field(strict=True, gt=0, le=1e4, allow_inf_nan=False)]


class Message(BaseModel):
    """The base of every structure on the wire: immutable, and unknown fields are an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )

    _unknown_fields = model_validator(mode="before")(refuse_unknown_fields)


class RequestMessage(Message):
    """The base of what a client sends: fields of None are left out of it."""


class Description(Message):
    """The base of what a server says of itself: fields of a later server are ignored."""

    model_config = ConfigDict(extra="ignore")


class TeacherIdentity(Message):
    """The identity of the teacher that answered, part of every answer.

    Answers with equal identities come from the same function of the request.
    """

    model: str
    fingerprint: str
    dtype: str
    backend: str
    version: str


class TokenizerIdentity(Description):
    """The identity of a tokenizer.

    Attributes:
        fingerprint: of the vocabulary, the (token, id) pairs.
        vocab_size: tokens in it.
        special_token_ids: may differ without harm.
        chat_template: may differ without harm.
        encoding: how it encodes text, from `shared.identity.encoding_fingerprint`; None from an
            older server.
    """

    fingerprint: str
    vocab_size: _Positive
    special_token_ids: dict[str, int]
    chat_template: str | None
    encoding: str | None = None

    def __repr__(self) -> str:
        return f"TokenizerIdentity({self.vocab_size:,} tokens, {self.fingerprint[:16]})"

    __str__ = __repr__


class Problem(Message):
    """An RFC 9457 problem document, the body of every refusal."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    field: str | None = None


class ScoreSequence(RequestMessage):
    """A sequence to score.

    Attributes:
        token_ids: [L] prompt and completion.
        completion_start: position of the first completion token, 1 ≤ completion_start < L.
        requested_token_ids: [T, m] further ids to score at each position, T = L − completion_start.
    """

    token_ids: TokenIds1D
    completion_start: _Int
    requested_token_ids: TokenIds2D | None = None


class ScoreRequest(RequestMessage):
    """The body of `POST /v1/score`, whose answer is a pure function of (teacher, request).

    So it is safe to retry and to cache.

    Attributes:
        top_k: ids at each position of the answer.
        temperature: at which the teacher's logits are normalised.
        logprob_dtype: of the answer's arrays, next token and tail excepted.
        sample_seed: when set, the ids at a position are not the most probable ones but ``top_k``
            draws from the teacher's distribution, with replacement. The seed, the sequence and the
            position fix them, whatever is scored in the same batch.
        model: the teacher to ask, by its name in `InfoResponse.models`; None for the first.
    """

    sequences: Annotated[list[ScoreSequence], Field(max_length=_LONGEST_LIST, fail_fast=True)]
    top_k: _Count
    temperature: _Temperature = 1.0
    logprob_dtype: LogprobDtype = "float32"
    sample_seed: _Seed | None = None
    model: str | None = None


class ScoreResponse(Message):
    """The answer of `POST /v1/score`: a `SparseLogprobs` for each sequence, in request order."""

    sequences: list[SparseLogprobs]
    teacher: TeacherIdentity
    request_id: str


class GenerateRequest(RequestMessage):
    """The body of `POST /v1/generate`.

    Attributes:
        prompts: each [L] token ids.
        n: completions for each prompt.
        max_new_tokens: longest completion, in tokens.
        temperature: of the sampling; 0 is greedy.
        top_p: nucleus sampling.
        sampling_top_k: sample among the k most probable tokens; 0 is all.
        seed: the same seed gives the same completions; None draws one.
        stop_token_ids: end a completion, beside the model's own end tokens, and stay part of it; at
            most `MAX_STOP_TOKEN_IDS`.
        top_k: when set, each completion carries the same arrays as `/v1/score` would give.
        score_temperature: temperature of those arrays.
        logprob_dtype: dtype of those arrays.
        stream: answer with each completion as soon as it is finished and scored: `GenerateEvent`s,
            then a `GenerateEnd`, instead of a `GenerateResponse`.
        model: the teacher to ask, by its name in `InfoResponse.models`; None for the first.
    """

    prompts: Annotated[list[TokenIds1D], Field(max_length=_LONGEST_LIST, fail_fast=True)]
    n: _Count = 1
    max_new_tokens: _Count = 256
    temperature: Annotated[float, Field(strict=True, ge=0, le=1e4, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] = 1.0
    sampling_top_k: _Index = 0
    seed: _Seed | None = None
    stop_token_ids: TokenIds1D | None = None
    top_k: _Count | None = None
    score_temperature: _Temperature = 1.0
    logprob_dtype: LogprobDtype = "float32"
    stream: Annotated[bool, Field(strict=True)] = False
    model: str | None = None


class Completion(Message):
    """A completion: its token ids [T], including the stop token if one was generated."""

    token_ids: TokenIds1D
    finish_reason: FinishReason
    scores: SparseLogprobs | None = None

    def __repr__(self) -> str:
        scored = "" if self.scores is None else ", scored"
        return f"Completion({len(self.token_ids)} tokens, {self.finish_reason}{scored})"

    __str__ = __repr__


class GenerateResponse(Message):
    """The answer of `POST /v1/generate`: ``completions[i][j]`` is the j-th one of prompt i."""

    completions: list[list[Completion]]
    teacher: TeacherIdentity
    request_id: str


class GenerateEvent(Message):
    """A finished completion of a streamed answer; events come in the order of finishing.

    Attributes:
        prompt: index of its prompt in the request.
        sample: which of the prompt's n completions.
    """

    prompt: _Index
    sample: _Index
    completion: Completion
    teacher: TeacherIdentity


class GenerateEnd(Message):
    """The last item of a streamed answer; without it the answer was cut off.

    Attributes:
        problem: why the other completions do not come; None when all have come.
    """

    teacher: TeacherIdentity
    request_id: str
    problem: Problem | None = None


class Limits(Description):
    """The limits of one request; a request over a limit is refused whole.

    Attributes:
        max_body_bytes: size of a request body.
        max_sequences: sequences, or prompts × n, in a request.
        max_tokens: tokens of all sequences, or of all prompts and their longest completions.
        max_top_k: largest ``top_k``; never above the vocabulary.
        max_requested_token_ids: largest m of ``requested_token_ids``.
        max_logprobs: positions × (top_k + m) of the whole answer, which bounds its size.
    """

    max_body_bytes: _Positive = 64 << 20
    max_sequences: _Positive = 1024
    max_tokens: _Positive = 262_144
    max_top_k: _Positive = 1024
    max_requested_token_ids: _Positive = 256
    max_logprobs: _Positive = 1 << 25


class Capabilities(Description):
    """The abilities of the backend; a request for anything else is refused, never ignored."""

    temperature: bool
    requested_token_ids: bool
    generate: bool
    sample_seed: bool = False


class InfoResponse(Description):
    """The answer of `GET /v1/info`.

    Attributes:
        teacher: the first of the teachers, which answers where a request names no model.
        vocab_size: size of the teacher's output layer, padding included.
        max_model_len: longest sequence in tokens.
        eos_token_ids: tokens that end the teacher's completions.
        models: every teacher that this server answers as, the first included: a base model and its
            adapters, which share all that stands here; empty from an older server, which is one.
    """

    protocol_version: int
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    vocab_size: _Positive
    max_model_len: _Positive
    eos_token_ids: list[int]
    limits: Limits
    capabilities: Capabilities
    models: list[TeacherIdentity] = []

    def served_as(self, name: str | None) -> TeacherIdentity | None:
        """Return the teacher that answers for a model's name, the first for None; None if none."""
        if name is None or name == self.teacher.model:
            return self.teacher
        return next((one for one in self.models if one.model == name), None)

    def __repr__(self) -> str:
        who = self.teacher
        return (
            f"InfoResponse({who.model}, {who.dtype}, {who.backend} {who.version}, "
            f"{self.vocab_size:,} tokens, context {self.max_model_len:,})"
        )

    __str__ = __repr__
