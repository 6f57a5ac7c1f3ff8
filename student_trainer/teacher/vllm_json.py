"""The JSON of a stock vLLM: a request, its answer, and what is read from an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.errors import TeacherAnswerError, TeacherChangedError
from shared.protocol import Completion
from shared.sparse import SparseLogprobs
from student_trainer.teacher.http import HttpClient

Choice: TypeAlias = dict[str, Any]  # of an answer of `/v1/completions`

# A tail mass below this cannot be told from 0, because the log-probs are float32.
_RESOLUTION = 2.0**-24
_ROUNDING_ABOVE_ZERO = 0.01  # rounding may raise a log-prob of 0 to this


def request_json(
    http: HttpClient, url: str, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Send a JSON request to one replica once, and return its answer, a JSON object.

    Raises: as `HttpClient.stream`; `TeacherAnswerError` for an answer that is no JSON object.
    """
    data = None if body is None else json.dumps(body).encode()
    content = http.request(url, method, path, data)
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TeacherAnswerError(f"{url}{path} answered something else: {error}") from error
    if not isinstance(answer, dict):
        raise TeacherAnswerError(f"{url}{path} answered {type(answer).__name__}, not an object")
    return answer


def read_choices(url: str, answer: Mapping[str, Any], *, model: str, count: int) -> list[Choice]:
    """Return the choices of an answer of `/v1/completions`, in the order of the prompts.

    Args:
        model: the model that was requested.
        count: number of prompts.

    Raises:
        TeacherChangedError: another model answered.
        TeacherAnswerError: choices are missing, or not one for each prompt.
    """
    answered, choices = answer.get("model"), answer.get("choices")
    if answered != model:
        raise TeacherChangedError(
            f"{model} was requested, {url} answered as {answered!r:.200}; check --teacher_url"
        )
    if not isinstance(choices, list) or len(choices) != count:
        raise TeacherAnswerError(
            f"{count} prompts were sent, {url} answered "
            f"{len(choices) if isinstance(choices, list) else f'{choices!r:.60}'} choices"
        )
    by_index = {
        choice["index"]: choice
        for choice in choices
        if isinstance(choice, dict) and isinstance(choice.get("index"), int)
    }
    if by_index.keys() != set(range(count)):
        raise TeacherAnswerError(
            f"{count} prompts were sent, {url} answered choices of {list(by_index)}"
        )
    return [by_index[index] for index in range(count)]


def read_scores(
    choice: Mapping[str, Any],
    ids: NDArray[np.uint32],
    start: int,
    *,
    top_k: int,
    vocab_size: int,
) -> SparseLogprobs:
    """Return the scores of the completion in one choice.

    vLLM names at each position its top-k and, if that is not among them, the next token. The
    tail is 1 minus their sum, in float64 from log-probs that were float32: a tail mass below
    2⁻²⁴ becomes 2⁻²⁴, and it is 0 only if the position names the whole vocabulary.

    Args:
        ids: token_ids [L] of the sequence, whose completion begins at ``start``.
        top_k: requested log-probs at each position.
        vocab_size: size of the teacher's vocabulary.

    Raises:
        TeacherAnswerError: positions or tokens are missing, or malformed.
    """
    positions = choice.get("prompt_logprobs")
    if not isinstance(positions, list) or len(positions) != len(ids):
        raise TeacherAnswerError(
            f"{len(ids)} positions of prompt_logprobs were requested, the teacher answered "
            f"{len(positions) if isinstance(positions, list) else f'{positions!r:.60}'}"
        )
    count = len(ids) - start
    token_ids = np.zeros((count, top_k), np.uint32)
    logprobs = np.zeros((count, top_k), np.float32)
    next_logprob = np.zeros(count, np.float32)
    tail = np.full(count, -np.inf, np.float32)
    for t, next_id in enumerate(ids[start:].tolist()):
        named = _read_position(positions[start + t], t, vocab_size)
        if next_id not in named or len(named) < top_k:
            raise TeacherAnswerError(
                f"position {t} names {len(named)} tokens; requested were {top_k} and id {next_id}"
            )
        next_logprob[t] = named[next_id]
        if len(named) < vocab_size:
            mass = math.fsum(map(math.exp, named.values()))
            tail[t] = math.log(max(1.0 - mass, _RESOLUTION))
        if len(named) > top_k:
            del named[next_id]
        top = sorted(named.items(), key=lambda item: -item[1])[:top_k]
        token_ids[t] = [token_id for token_id, _ in top]
        logprobs[t] = [logprob for _, logprob in top]
    return SparseLogprobs(
        token_ids=token_ids,
        logprobs=logprobs,
        next_token_logprob=next_logprob,
        tail_logprob=tail,
    )


def _read_position(position: Any, number: int, vocab_size: int) -> dict[int, float]:
    """Return {token id: log-prob} of one position of ``prompt_logprobs``.

    Raises:
        TeacherAnswerError: it is malformed; names its number.
    """
    try:
        named = {int(token_id): float(entry["logprob"]) for token_id, entry in position.items()}
        if len(named) == len(position) and all(
            0 <= token_id < vocab_size and not logprob > _ROUNDING_ABOVE_ZERO
            for token_id, logprob in named.items()
        ):
            return named
        raise ValueError("an id outside the vocabulary or twice, or a log-prob above 0")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TeacherAnswerError(
            f"position {number} of prompt_logprobs is malformed: {error!r:.200}"
        ) from error


def read_completion(choice: Mapping[str, Any]) -> Completion:
    """Return the completion in one choice, without scores.

    Raises:
        TeacherAnswerError: its tokens or its finish reason are missing, or malformed.
    """
    token_ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(token_ids, list) or not token_ids or reason not in ("stop", "length"):
        raise TeacherAnswerError(
            f"a completion came without token_ids or with finish_reason {reason!r:.60}; "
            "return_token_ids needs vLLM 0.10.2 or later"
        )
    try:
        return Completion.model_validate({"token_ids": token_ids, "finish_reason": reason})
    except ValidationError as error:
        raise TeacherAnswerError(
            f"a completion came with token_ids that are none: {token_ids!r:.60}"
        ) from error
