"""A teacher without a model that takes the time it is told to, one request after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from shared import wire
from shared.protocol import InfoResponse, ScoreRequest, ScoreResponse
from shared.sparse import SparseLogprobs
from tests.support import stub

_ROWS = 1 << 12


@cache
def _distributions(vocab_size: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """(log-probs [_ROWS, V], ids of the k largest [_ROWS, k]) of random rows, computed once."""
    logits = np.random.default_rng(0).normal(0, 2, (_ROWS, vocab_size))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    top = np.argsort(-logprobs, axis=1)[:, :k]
    return logprobs.astype(np.float32), top.astype(np.uint32)


def scores_of(
    token_ids: NDArray[np.uint32], completion_start: int, vocab_size: int, k: int
) -> SparseLogprobs:
    """One distribution for each completion row, chosen by the tokens up to there."""
    logprobs, top = _distributions(vocab_size, k)
    seen = np.cumsum(token_ids.astype(np.int64) * (np.arange(len(token_ids)) + 7))
    rows = seen[completion_start - 1 : -1] % _ROWS
    following = token_ids[completion_start:].astype(np.int64)
    values = np.take_along_axis(logprobs[rows], top[rows].astype(np.int64), axis=1)
    rest = logprobs[rows]
    np.put_along_axis(rest, top[rows].astype(np.int64), -np.inf, axis=1)
    np.put_along_axis(rest, following[:, None], -np.inf, axis=1)
    return SparseLogprobs(
        token_ids=top[rows],
        logprobs=values,
        next_token_logprob=logprobs[rows, following],
        tail_logprob=np.log(np.exp(rest).sum(axis=1)),
    )


@dataclass
class PacedTeacher:
    """Scores that depend on the tokens alone, after ``seconds_for`` that many tokens.

    Attributes:
        info: what it says of itself.
        seconds_for: time that the answer to so many tokens takes.
        one_at_a_time: requests wait for one another, as on one device.
    """

    info: InfoResponse
    seconds_for: Callable[[int], float]
    one_at_a_time: bool = True
    _device: threading.Lock = field(default_factory=threading.Lock)

    def get(self, path: str) -> stub.Answer:
        if path == "/v1/info":
            return stub.packed(self.info)
        return 200, {}, b"{}"

    def post(self, path: str, body: bytes) -> stub.Answer:
        request = wire.load(ScoreRequest, body, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 28)
        seconds = self.seconds_for(sum(len(s.token_ids) for s in request.sequences))
        if self.one_at_a_time:
            with self._device:
                time.sleep(seconds)
        else:
            time.sleep(seconds)
        answer = ScoreResponse(
            sequences=[
                scores_of(s.token_ids, s.completion_start, self.info.vocab_size, request.top_k)
                for s in request.sequences
            ],
            teacher=self.info.teacher,
            request_id="r",
        )
        return stub.packed(answer)
