"""The interface between the server and an engine, whose jobs are one sequence each.

An engine batches as it likes: the transformers backend by `teacher_server.batcher`, an engine with
continuous batching by its own scheduler. Requests are checked before they reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.protocol import (
    Capabilities,
    Completion,
    LogprobDtype,
    TeacherIdentity,
    TokenizerIdentity,
)
from shared.sparse import SparseLogprobs
from shared.text import StopStrings


@dataclass(frozen=True)
class ScoreJob:
    """A sequence to score; fields as in `shared.protocol.ScoreSequence` and `ScoreRequest`.

    ``client`` is the sender of the request, because clients take turns. ``adapter`` is the name of
    the adapter that scores; None for the base model.
    """

    token_ids: NDArray[np.uint32]  # [L]
    completion_start: int
    top_k: int
    temperature: float = 1.0
    requested_token_ids: NDArray[np.uint32] | None = None  # [T, m]
    logprob_dtype: LogprobDtype = "float32"
    draw_key: bytes | None = None  # seeds a sampled support; None for the top k
    client: str = ""
    adapter: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def rows(self) -> int:
        return len(self.token_ids) - self.completion_start

    @property
    def answer_bytes(self) -> int:
        """The size of the answer's arrays in float32, in bytes."""
        requested = 0 if self.requested_token_ids is None else int(self.requested_token_ids.size)
        return self.rows * (8 * self.top_k + 8) + 4 * requested


@dataclass(frozen=True)
class ScoreOptions:
    """The options for scoring a generated completion."""

    top_k: int
    temperature: float = 1.0
    logprob_dtype: LogprobDtype = "float32"


@dataclass(frozen=True)
class GenerateJob:
    """A completion to generate; ``temperature`` 0 is greedy.

    ``key`` seeds the sampling: equal keys give equal completions, whatever else is in the batch.
    ``client`` is the sender of the request, because clients take turns. ``adapter`` is the name of
    the adapter that generates; None for the base model.
    """

    prompt: NDArray[np.uint32]  # [P]
    max_new_tokens: int
    temperature: float
    top_p: float
    sampling_top_k: int
    key: tuple[int | bytes, ...]
    stop_token_ids: tuple[int, ...] = ()
    score: ScoreOptions | None = None
    client: str = ""
    stop: StopStrings | None = None  # beside the stop tokens
    adapter: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.max_new_tokens

    @property
    def answer_bytes(self) -> int:
        """The size of the longest possible answer's arrays in float32, in bytes."""
        scores = 0 if self.score is None else 8 * self.score.top_k + 8
        return self.max_new_tokens * (4 + scores)

    def score_job(self, completion: NDArray[np.uint32]) -> ScoreJob:
        """Return the job that scores this job's completion [T]; ``score`` must not be None."""
        assert self.score is not None
        return ScoreJob(
            token_ids=np.concatenate([self.prompt, completion]).astype(np.uint32),
            completion_start=len(self.prompt),
            top_k=self.score.top_k,
            temperature=self.score.temperature,
            logprob_dtype=self.score.logprob_dtype,
            client=self.client,
            adapter=self.adapter,
        )


@dataclass(frozen=True)
class BackendFacts:
    """The facts about an engine and its model that `/v1/info` reports.

    ``adapters`` are the identities of the adapters that it serves beside the base model.
    """

    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    capabilities: Capabilities
    adapters: tuple[TeacherIdentity, ...] = ()


class Backend(Protocol):
    """An engine with its model loaded; every method may be called from many tasks at once."""

    facts: BackendFacts

    @property
    def alive(self) -> bool:
        """The health of the engine: False once nothing but a restart helps."""
        ...

    async def score(self, job: ScoreJob) -> SparseLogprobs:
        """Score one sequence. Cancelling the task drops the work."""
        ...

    async def generate(self, job: GenerateJob) -> Completion:
        """Generate one completion. Cancelling the task drops the work."""
        ...

    async def close(self) -> None:
        """Free the engine; jobs still waiting fail with `UnavailableError`."""
        ...
