"""The jobs that requests become, each with a key that names all it asks for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from shared.protocol import GenerateRequest, InfoResponse, ScoreRequest, ScoreSequence
from shared.text import StopStrings
from shared.validation import check_model
from teacher_server.backends.base import GenerateJob, ScoreJob, ScoreOptions

Job = ScoreJob | GenerateJob
J_co = TypeVar("J_co", bound=Job, covariant=True)


@dataclass(frozen=True)
class Keyed(Generic[J_co]):
    """A job and its key: jobs of one key have the same client and the same answer."""

    job: J_co
    key: bytes


def adapter_of(model: str | None, info: InfoResponse) -> str | None:
    """Return the adapter that a request's ``model`` names; None for the base model.

    Raises:
        NotFoundError: no such model is served.
    """
    served = check_model(model, info)
    return None if served == info.teacher else served.model


def score_jobs(
    request: ScoreRequest, client: str, adapter: str | None = None
) -> list[Keyed[ScoreJob]]:
    """Return a job for each sequence of a checked request, in order."""
    jobs = [
        ScoreJob(
            token_ids=sequence.token_ids,
            completion_start=sequence.completion_start,
            top_k=request.top_k,
            temperature=request.temperature,
            requested_token_ids=sequence.requested_token_ids,
            logprob_dtype=request.logprob_dtype,
            draw_key=_draw_key(request.sample_seed, sequence),
            client=client,
            adapter=adapter,
        )
        for sequence in request.sequences
    ]
    return [Keyed(job, job_key(job)) for job in jobs]


def generate_jobs(
    request: GenerateRequest,
    client: str,
    stop: StopStrings | None = None,
    adapter: str | None = None,
) -> list[Keyed[GenerateJob]]:
    """Return a job for each completion of a checked request: n of each prompt, in order."""
    unseeded = request.temperature > 0 and request.seed is None
    seed = int.from_bytes(os.urandom(7)) if unseeded else request.seed or 0
    stop_ids = [] if request.stop_token_ids is None else np.unique(request.stop_token_ids).tolist()
    score = None
    if request.top_k is not None:
        score = ScoreOptions(
            top_k=request.top_k,
            temperature=request.score_temperature,
            logprob_dtype=request.logprob_dtype,
        )
    jobs = [
        GenerateJob(
            prompt=prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            sampling_top_k=request.sampling_top_k,
            key=(seed, prompt.astype("<u4").tobytes(), number),
            stop_token_ids=tuple(stop_ids),
            score=score,
            client=client,
            stop=stop,
            adapter=adapter,
        )
        for prompt in request.prompts
        for number in range(request.n)
    ]
    return [Keyed(job, job_key(job)) for job in jobs]


def total_tokens(jobs: Sequence[Keyed[Job]]) -> int:
    """Return the tokens that the jobs bring to the queue."""
    return sum(one.job.tokens for one in jobs)


def total_answer_bytes(jobs: Sequence[Keyed[Job]]) -> int:
    """Return the bytes of the arrays that the jobs are answered with, in float32."""
    return sum(one.job.answer_bytes for one in jobs)


def job_key(job: Job) -> bytes:
    """Return the SHA-256 of all fields of a job, its client included.

    The fields are those of the dataclass, so one that is added later counts by itself.

    Raises:
        TypeError: a field holds a value of a type that is not hashed here.
    """
    buffers: list[Any] = []
    digest = hashlib.sha256(repr(_described(job, buffers)).encode())
    for buffer in buffers:
        digest.update(buffer)
    return digest.digest()


def _described(value: Any, buffers: list[Any]) -> Any:
    """Return ``value`` as nested tuples that say its type and size, no two values alike.

    The content of arrays and bytes is appended to ``buffers``, uncopied where it is contiguous.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        buffers.append(array.reshape(-1).view(np.uint8))
        return kind, array.dtype.str, array.shape
    if isinstance(value, bytes):
        buffers.append(value)
        return kind, len(value)
    if isinstance(value, tuple):
        return kind, *(_described(item, buffers) for item in value)
    if is_dataclass(value):
        return kind, *(_described(getattr(value, one.name), buffers) for one in fields(value))
    raise TypeError(f"a job holds a {kind}, which its key cannot count; teach `job_key` to")


def _draw_key(seed: int | None, sequence: ScoreSequence) -> bytes | None:
    """Return what names the draws of a sampled support; None where nothing is drawn.

    It depends on seed and content, so a sequence meets the same draws in whatever request it comes.
    """
    if seed is None:
        return None
    content = seed.to_bytes(8, "little") + sequence.token_ids.astype("<u4").tobytes()
    return hashlib.sha256(content).digest()
