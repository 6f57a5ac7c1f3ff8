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
from shared.protocol import InfoResponse, LogprobDtype, ScoreRequest, ScoreResponse, ScoreSequence
from shared.sparse import SparseLogprobs
from tests.support import stub

_ROWS = 1 << 10


@cache
def _distributions(vocab_size: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(log-probs [_ROWS, V], ids of the k largest [_ROWS, k]) of random rows, computed once."""
    logits = np.random.default_rng(0).normal(0, 2, (_ROWS, vocab_size))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    top = np.argsort(-logprobs, axis=1)[:, :k]
    return logprobs.astype(np.float32), top


def scores_of(
    sequence: ScoreSequence, vocab_size: int, k: int, dtype: LogprobDtype = "float32"
) -> SparseLogprobs:
    """One distribution for each completion row, chosen by the tokens up to there."""
    logprobs, top = _distributions(vocab_size, k)
    start, ids = sequence.completion_start, sequence.token_ids.astype(np.int64)
    rows = np.cumsum(ids * (np.arange(len(ids)) + 7))[start - 1 : -1] % _ROWS
    named = [top[rows], ids[start:, None]]
    if sequence.requested_token_ids is not None:
        named.append(sequence.requested_token_ids.astype(np.int64))
    values = [np.take_along_axis(logprobs[rows], part, axis=1) for part in named]
    rest = logprobs[rows]
    np.put_along_axis(rest, np.concatenate(named, axis=1), -np.inf, axis=1)
    return SparseLogprobs(
        token_ids=named[0].astype(np.uint32),
        logprobs=values[0].astype(dtype),
        next_token_logprob=values[1][:, 0],
        tail_logprob=np.log(np.exp(rest).sum(axis=1)),
        requested_logprobs=values[2].astype(dtype) if len(values) > 2 else None,
    )


@dataclass
class PacedTeacher:
    """Scores that depend on the tokens alone, and come as late as is asked.

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
                scores_of(sequence, self.info.vocab_size, request.top_k, request.logprob_dtype)
                for sequence in request.sequences
            ],
            teacher=self.info.teacher,
            request_id="r",
        )
        return stub.packed(answer)
