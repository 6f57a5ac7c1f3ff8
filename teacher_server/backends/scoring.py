"""Hidden states of completion rows -> sparse log-probs with an exact tail, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from shared.errors import InternalError
from shared.sparse import SparseLogprobs
from teacher_server.backends.base import ScoreJob

# Logits of one chunk in float32; the exponentials of a log-sum-exp come on top.
CHUNK_BYTES = 128 << 20

Head = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def score_rows(
    hidden: torch.Tensor, head: Head, jobs: Sequence[ScoreJob], vocab_size: int
) -> list[SparseLogprobs]:
    """Score the completion rows of all jobs, chunk by chunk.

    Args:
        hidden: [N, d], the rows of the jobs one after another: row t of a job is the state that
            predicts its token at ``completion_start + t``.
        head: projects [n, d] to logits [n, V].
        jobs: with any mixture of top_k, temperature, requested ids and dtypes.

    Raises:
        InternalError: the model answered NaN or infinity for one of the jobs.
    """
    first_row = np.cumsum([0, *(job.rows for job in jobs)])  # of each job in ``hidden``
    alike: dict[tuple[int, int], list[int]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault((job.top_k, _width(job)), []).append(index)
    answers: dict[int, SparseLogprobs] = {}
    # Jobs of one k go together: a row is never ranked deeper than was asked, so neither the answer
    # (which of two equal tokens ranks first may depend on k) nor the memory depends on its company.
    for members in alike.values():
        rows = np.concatenate([np.arange(first_row[i], first_row[i + 1]) for i in members])
        states = hidden[torch.from_numpy(rows).to(hidden.device)]
        arrays = _score_alike(states, head, [jobs[i] for i in members], vocab_size)
        last = 0
        for index in members:
            first, last = last, last + jobs[index].rows
            answers[index] = _pack(jobs[index], *(array[first:last] for array in arrays))
    return [answers[index] for index in range(len(jobs))]


def _score_alike(
    hidden: torch.Tensor, head: Head, jobs: Sequence[ScoreJob], vocab_size: int
) -> list[np.ndarray]:
    """What `_score_chunk` returns, for all rows of jobs that share k and m."""
    device = hidden.device
    k = jobs[0].top_k
    extra = torch.from_numpy(_extra_ids(jobs)).to(device)  # [N, 1 + m]: next token, requested
    temperature = torch.tensor(
        [job.temperature for job in jobs for _ in range(job.rows)], device=device
    )[:, None]  # [N, 1]
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    parts = [
        _score_chunk(
            head(hidden[i : i + size]).float().div_(temperature[i : i + size]),
            extra[i : i + size],
            k,
        )
        for i in range(0, hidden.shape[0], size)
    ]
    return [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]


def _score_chunk(
    logits: torch.Tensor, extra: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(top ids [n, k], their log-probs [n, k], log-probs of ``extra`` [n, 1 + m], tail [n]).

    ``logits`` are used up.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)  # [n, 1]
    values, ids = logits.topk(k, dim=-1)  # [n, k], most probable first
    named = logits.gather(1, extra)  # [n, 1 + m]
    # The tail is summed over what no column names, never taken as 1 − p.
    rest = logits.scatter_(1, ids, float("-inf")).scatter_(1, extra, float("-inf"))
    tail = rest.logsumexp(dim=-1) - total[:, 0]
    return ids, values - total, named - total, tail


def _extra_ids(jobs: Sequence[ScoreJob]) -> np.ndarray:
    """[N, 1 + m] int64: the next token, then the requested ids."""
    parts = []
    for job in jobs:
        ids = job.token_ids[job.completion_start :].astype(np.int64)[:, None]
        if job.requested_token_ids is not None:
            ids = np.concatenate([ids, job.requested_token_ids.astype(np.int64)], axis=1)
        parts.append(ids)
    return np.concatenate(parts)


def _width(job: ScoreJob) -> int:
    return 0 if job.requested_token_ids is None else int(job.requested_token_ids.shape[1])


def _pack(
    job: ScoreJob, ids: np.ndarray, logprobs: np.ndarray, named: np.ndarray, tails: np.ndarray
) -> SparseLogprobs:
    finite = np.isfinite(logprobs).all() and np.isfinite(named).all()
    if not (finite and (np.isfinite(tails) | np.isneginf(tails)).all()):
        raise InternalError(
            f"the model's log-probs are not finite in a sequence of {job.tokens} tokens. Check "
            "the teacher's weights, or serve it with --dtype float32"
        )
    requested = None
    if job.requested_token_ids is not None:
        requested = _to_dtype(named[:, 1:], job.logprob_dtype)
    return SparseLogprobs(
        token_ids=ids.astype(np.uint32),
        logprobs=_to_dtype(logprobs, job.logprob_dtype),
        next_token_logprob=np.ascontiguousarray(named[:, 0]),
        tail_logprob=tails,
        requested_logprobs=requested,
    )


def _to_dtype(logprobs: np.ndarray, dtype: str) -> np.ndarray:
    """float16 ends at −65504: lower log-probs are answered as that, never as −inf."""
    if dtype == "float16":
        return np.maximum(logprobs, np.finfo(np.float16).min).astype(np.float16)
    return np.ascontiguousarray(logprobs)
