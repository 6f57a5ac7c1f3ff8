"""A backend that computes nothing and whose first token decides how it answers."""

from __future__ import annotations

import asyncio

import numpy as np

from shared.errors import InternalError
from shared.protocol import (
    Capabilities,
    Completion,
    TeacherIdentity,
    TokenizerIdentity,
)
from shared.sparse import SparseLogprobs
from teacher_server.backends.base import BackendFacts, GenerateJob, ScoreJob


class Engine:
    """A backend of zeros: sequences that begin with 99 raise an `InternalError`, with 98 crash.

    Those that begin with 97 never end; completions of 96 and 98 wait until ``release`` is set.
    """

    alive = True
    cancelled = 0

    def __init__(self) -> None:
        self.release = asyncio.Event()

    facts = BackendFacts(
        teacher=TeacherIdentity(model="m", fingerprint="f", dtype="d", backend="b", version="v"),
        tokenizer=TokenizerIdentity(
            fingerprint="t", vocab_size=100, special_token_ids={}, chat_template=None
        ),
        vocab_size=100,
        max_model_len=64,
        eos_token_ids=(1,),
        capabilities=Capabilities(temperature=True, requested_token_ids=True, generate=True),
    )

    async def score(self, job: ScoreJob) -> SparseLogprobs:
        if job.token_ids[0] == 99:
            raise InternalError("not finite")
        if job.token_ids[0] == 98:
            raise ZeroDivisionError("secret of the house")
        if job.token_ids[0] == 97:
            await asyncio.Event().wait()
        rows, k = job.rows, job.top_k
        return SparseLogprobs(
            token_ids=np.zeros((rows, k), np.uint32),
            logprobs=np.zeros((rows, k), np.float32),
            next_token_logprob=np.zeros(rows, np.float32),
            tail_logprob=np.full(rows, -np.inf, np.float32),
        )

    async def generate(self, job: GenerateJob) -> Completion:
        if job.prompt[0] == 99:
            raise InternalError("not finite")
        try:
            if job.prompt[0] in (96, 97, 98):
                await (self.release if job.prompt[0] != 97 else asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if job.prompt[0] == 98:
            raise ZeroDivisionError("secret of the house")
        return Completion(token_ids=np.array([job.key[2], 1], np.uint32), finish_reason="stop")

    async def close(self) -> None:
        pass
