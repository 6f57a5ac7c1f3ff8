"""Write log-probs and answers of any size as OpenAI's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shared.protocol import InfoResponse, TeacherIdentity
from shared.sparse import SparseLogprobs
from teacher_server.openai.schema import Ids

# Items of a list that json writes at a time, because it holds the GIL meanwhile.
_WRITTEN_ITEMS = 1024
# Stands for a log-prob of −inf, which JSON does not have.
LOWEST = -9999.0


class WrittenJson(str):
    """A string of finished JSON, which takes less memory than the maps it was written from."""


# Tokens [T] and their scores, or None.
Part = tuple[Ids, SparseLogprobs | None]


def model_card(served: TeacherIdentity, info: InfoResponse) -> dict[str, Any]:
    """Return a served model as `/v1/models` lists it; ``max_model_len`` is vLLM's addition."""
    return {
        "id": served.model,
        "object": "model",
        "created": 0,
        "owned_by": "sparse-gkd",
        "root": served.model,
        "parent": None if served == info.teacher else info.teacher.model,
        "max_model_len": info.max_model_len,
    }


def json_pieces(value: Any) -> Iterator[str]:
    """Yield ``value`` as JSON in small pieces, because json's own loop holds the GIL."""
    if isinstance(value, WrittenJson):
        yield value
    elif isinstance(value, dict):
        before = "{"
        for name, item in value.items():
            yield f"{before}{json.dumps(name)}: "
            yield from json_pieces(item)
            before = ", "
        yield "}" if value else "{}"
    elif isinstance(value, list) and any(isinstance(item, dict | WrittenJson) for item in value):
        before = "["
        for item in value:
            yield before
            yield from json_pieces(item)
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


def completion_logprobs(parts: Sequence[Part], k: int, name: Any) -> dict[str, Any]:
    """Return OpenAI's ``logprobs`` of a completion, or of an echoed prompt and its completion.

    A token has the same value in both lists. Tokens with the same text share one key, which holds
    the most probable one's value.
    """
    tokens: list[str] = []
    own: list[float | None] = []
    top: list[WrittenJson | None] = []
    for ids, scores in parts:
        tokens += [name(token_id) for token_id in ids.tolist()]
        if scores is None:
            own += [None] * len(ids)
            top += [None] * len(ids)
            continue
        following = zip(ids.tolist(), scores.next_token_logprob.tolist(), strict=True)
        for (token_id, logprob), pairs in zip(following, _top(scores, k), strict=True):
            value = dict(pairs).get(token_id, max(logprob, LOWEST))
            named = {name(token_id): value}
            for i, other in pairs:
                named[name(i)] = max(other, named.get(name(i), other))
            own.append(value)
            top.append(WrittenJson(json.dumps(named)))
    offsets = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(parts: Sequence[Part], k: int, name: Any) -> dict[str, Any]:
    """Return OpenAI's ``logprobs`` of a chat completion."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = name(token_id)
        return {"token": token, "logprob": max(logprob, LOWEST), "bytes": list(token.encode())}

    ((ids, scores),) = parts  # a chat answer repeats no prompt
    assert scores is not None
    own = scores.next_token_logprob.tolist()
    return {
        "content": [
            WrittenJson(
                json.dumps({**entry(i, logprob), "top_logprobs": [entry(*pair) for pair in pairs]})
            )
            for i, logprob, pairs in zip(ids.tolist(), own, _top(scores, k), strict=True)
        ]
    }


def _top(scores: SparseLogprobs, k: int) -> Iterator[list[tuple[int, float]]]:
    """Yield the k most probable (id, log-prob) pairs of each position; k may be 0."""
    positions = zip(scores.token_ids[:, :k].tolist(), scores.logprobs[:, :k].tolist(), strict=True)
    for ids, logprobs in positions:
        clamped = [max(value, LOWEST) for value in logprobs]
        yield list(zip(ids, clamped, strict=True))
