"""A teacher without a model whose answers take a chosen time, one after another."""

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
    """Return log-probs [_ROWS, V] and ids of the k largest [_ROWS, k] of random rows."""
    logits = np.random.default_rng(0).normal(0, 2, (_ROWS, vocab_size))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    top = np.argsort(-logprobs, axis=1)[:, :k]
    return logprobs.astype(np.float32), top


def scores_of(
    sequence: ScoreSequence, vocab_size: int, k: int, dtype: LogprobDtype = "float32"
) -> SparseLogprobs:
    """Return a distribution for each completion position, chosen by the tokens up to there."""
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
    """A teacher whose scores depend on the tokens alone and take a chosen time.

    Attributes:
        info: the answer of ``/v1/info``.
        seconds_for: returns the time that the answer to so many tokens takes.
        one_at_a_time: whether requests wait for one another, as on one device.
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
