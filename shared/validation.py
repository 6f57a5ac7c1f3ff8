"""Check requests against a teacher's limits before any work is done.

Every refusal is an `InvalidRequestError` (422) that names the field, the value and the limit; of a
model that is not served, a `NotFoundError` (404). The server checks what arrives; the trainer's
client splits its work so as never to be refused.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidRequestError, NotFoundError
from shared.protocol import (
    MAX_STOP_TOKEN_IDS,
    MIN_TEMPERATURE,
    Capabilities,
    GenerateRequest,
    InfoResponse,
    ScoreRequest,
    ScoreSequence,
    TeacherIdentity,
)


def check_model(name: str | None, info: InfoResponse) -> TeacherIdentity:
    """Return the identity of the teacher that a request names; that of the first for None.

    Raises:
        NotFoundError: no such model is served; names those that are.
    """
    found = info.served_as(name)
    if found is None:
        served = ", ".join(repr(one.model) for one in info.models or [info.teacher])
        raise NotFoundError(
            f"the model {name!r:.200} is not served here; served: {served:.2000}", field="model"
        )
    return found


def check_score_request(request: ScoreRequest, info: InfoResponse) -> None:
    """Refuse a request that the teacher of ``info`` cannot score.

    Raises:
        NotFoundError: it names a model that is not served.
        InvalidRequestError: names the field, the value and the limit.
    """
    check_model(request.model, info)
    limits = info.limits
    _check_count("sequences", len(request.sequences), limits.max_sequences)
    _check_top_k(request.top_k, info)
    _check_temperature("temperature", request.temperature, info.capabilities)
    if request.sample_seed is not None and not info.capabilities.sample_seed:
        raise InvalidRequestError("this teacher draws no samples", field="sample_seed")
    tokens = entries = 0
    for index, sequence in enumerate(request.sequences):
        positions, width = _check_sequence(f"sequences.{index}", sequence, info)
        tokens += len(sequence.token_ids)
        entries += positions * (request.top_k + width)
    _check_total("sequences", "tokens", tokens, limits.max_tokens)
    _check_total("sequences", "log-probs in the answer", entries, limits.max_logprobs)


def check_generate_request(request: GenerateRequest, info: InfoResponse) -> None:
    """Refuse a request that the teacher of ``info`` cannot generate.

    Raises:
        NotFoundError: it names a model that is not served.
        InvalidRequestError: names the field, the value and the limit.
    """
    check_model(request.model, info)
    limits = info.limits
    if not info.capabilities.generate:
        raise InvalidRequestError("this teacher does not generate", field="prompts")
    _check_count("prompts", len(request.prompts) * request.n, limits.max_sequences)
    tokens = 0
    for index, prompt in enumerate(request.prompts):
        field = f"prompts.{index}"
        length = len(prompt) + request.max_new_tokens
        if length > info.max_model_len:
            raise InvalidRequestError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {request.max_new_tokens} "
                f"make {length} tokens; the teacher's context is {info.max_model_len}",
                field=field,
            )
        _check_token_ids(field, prompt, info.vocab_size)
        tokens += length * request.n
    _check_total("prompts", "tokens", tokens, limits.max_tokens)
    if request.temperature:
        _check_warm("temperature", request.temperature, ", or 0 for greedy decoding")
    if request.stop_token_ids is not None and len(request.stop_token_ids):
        count = len(request.stop_token_ids)
        _check_total("stop_token_ids", "stop tokens", count, MAX_STOP_TOKEN_IDS, "Send fewer")
        _check_range("stop_token_ids", request.stop_token_ids, info.vocab_size)
    if request.top_k is not None:
        _check_top_k(request.top_k, info)
        _check_temperature("score_temperature", request.score_temperature, info.capabilities)
        positions = request.max_new_tokens * len(request.prompts) * request.n
        entries = positions * request.top_k
        _check_total("top_k", "log-probs in the answer", entries, limits.max_logprobs)


def _check_sequence(field: str, sequence: ScoreSequence, info: InfoResponse) -> tuple[int, int]:
    """Return a sequence's completion length T and its requested ids m at each position.

    Raises:
        InvalidRequestError: the teacher of ``info`` cannot score it.
    """
    length = len(sequence.token_ids)
    if length > info.max_model_len:
        raise InvalidRequestError(
            f"{length} tokens; the teacher's context is {info.max_model_len}",
            field=f"{field}.token_ids",
        )
    _check_token_ids(f"{field}.token_ids", sequence.token_ids, info.vocab_size)
    start = sequence.completion_start
    if not 1 <= start < length:
        raise InvalidRequestError(
            f"completion_start {start} must be from 1 to {length - 1} for a sequence of {length} "
            "tokens: one token comes before the completion, and the completion is not empty",
            field=f"{field}.completion_start",
        )
    positions = length - start
    requested = sequence.requested_token_ids
    if requested is None:
        return positions, 0
    field = f"{field}.requested_token_ids"
    if not info.capabilities.requested_token_ids:
        raise InvalidRequestError("this teacher cannot score requested ids", field=field)
    if requested.shape[0] != positions:
        raise InvalidRequestError(
            f"{requested.shape[0]} rows for {positions} completion tokens", field=field
        )
    width, limit = requested.shape[1], info.limits.max_requested_token_ids
    if width > limit:
        raise InvalidRequestError(f"{width} ids in a row; the limit is {limit}", field=field)
    _check_range(field, requested, info.vocab_size)
    return positions, width


def _check_token_ids(field: str, token_ids: NDArray[np.uint32], vocab_size: int) -> None:
    if len(token_ids) == 0:
        raise InvalidRequestError("no tokens; send at least one", field=field)
    _check_range(field, token_ids, vocab_size)


def _check_range(field: str, token_ids: NDArray[np.uint32], vocab_size: int) -> None:
    if token_ids.size and int(token_ids.max()) >= vocab_size:
        raise InvalidRequestError(
            f"token id {int(token_ids.max())} is outside the teacher's vocabulary of {vocab_size}",
            field=field,
        )


def _check_top_k(top_k: int, info: InfoResponse) -> None:
    if top_k > info.limits.max_top_k:
        raise InvalidRequestError(
            f"top_k {top_k} is over the limit {info.limits.max_top_k}", field="top_k"
        )


def _check_warm(field: str, temperature: float, alternative: str = "") -> None:
    if temperature < MIN_TEMPERATURE:
        raise InvalidRequestError(
            f"{field} {temperature} is below {MIN_TEMPERATURE}; use that{alternative}", field=field
        )


def _check_temperature(field: str, temperature: float, capabilities: Capabilities) -> None:
    _check_warm(field, temperature)
    if temperature != 1.0 and not capabilities.temperature:
        raise InvalidRequestError(
            f"{field} {temperature}: this teacher's backend cannot apply a temperature; use 1.0",
            field=field,
        )


def _check_count(field: str, count: int, limit: int) -> None:
    if count == 0:
        raise InvalidRequestError("empty; send at least one", field=field)
    _check_total(field, "sequences", count, limit)


def _check_total(
    field: str, what: str, total: int, limit: int, remedy: str = "Split the request"
) -> None:
    if total > limit:
        raise InvalidRequestError(f"{total} {what}; the limit is {limit}. {remedy}", field=field)
