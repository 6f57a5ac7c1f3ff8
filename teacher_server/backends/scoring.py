"""Hidden states of completion rows -> sparse log-probs with an exact tail, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from shared.errors import InternalError
from shared.sparse import SparseLogprobs
from teacher_server.backends.base import ScoreJob

# Logits of one chunk; float32 copies for log-softmax and tail come on top.
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
        jobs: with different top_k, temperature, requested ids and dtypes.

    Raises:
        InternalError: the model answered NaN or infinity; names the sequence.
    """
    device = hidden.device
    k = max(job.top_k for job in jobs)
    m = max((_width(job) for job in jobs), default=0)
    extra = torch.from_numpy(_extra_ids(jobs, m)).to(device)  # [N, 1 + m]: next token, requested
    temperature = torch.tensor(
        [job.temperature for job in jobs for _ in range(job.rows)], device=device
    )[:, None]  # [N, 1]
    top_k = torch.tensor([job.top_k for job in jobs for _ in range(job.rows)], device=device)
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    parts = [
        _score_chunk(
            head(hidden[i : i + size]).float() / temperature[i : i + size],
            extra[i : i + size],
            top_k[i : i + size],
            k,
        )
        for i in range(0, hidden.shape[0], size)
    ]
    ids, logprobs, named, tails = (
        torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)
    )
    answers = []
    first = 0
    for index, job in enumerate(jobs):
        rows = slice(first, first + job.rows)
        first += job.rows
        answers.append(_pack(job, ids[rows], logprobs[rows], named[rows], tails[rows], index))
    return answers


def _score_chunk(
    logits: torch.Tensor, extra: torch.Tensor, top_k: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(top ids [n, k], their log-probs [n, k], log-probs of ``extra`` [n, 1 + m], tail [n]).

    A row keeps its own first ``top_k``; the ids behind belong to its tail.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)  # [n, 1]
    values, ids = logits.topk(k, dim=-1)  # [n, k], most probable first
    named = logits.gather(1, extra)  # [n, 1 + m]
    # The tail is summed over what no column names, never taken as 1 − p.
    beyond = torch.arange(k, device=logits.device) >= top_k[:, None]  # [n, k]
    own = torch.where(beyond, ids[:, :1], ids)
    rest = logits.scatter(1, own, float("-inf")).scatter_(1, extra, float("-inf"))
    tail = rest.logsumexp(dim=-1) - total[:, 0]
    return ids, values - total, named - total, tail


def _extra_ids(jobs: Sequence[ScoreJob], width: int) -> np.ndarray:
    """[N, 1 + m] int64: the next token, then the requested ids, padded by the next token."""
    parts = []
    for job in jobs:
        following = job.token_ids[job.completion_start :].astype(np.int64)[:, None]
        ids = np.repeat(following, 1 + width, axis=1)
        if job.requested_token_ids is not None:
            ids[:, 1 : 1 + _width(job)] = job.requested_token_ids
        parts.append(ids)
    return np.concatenate(parts)


def _width(job: ScoreJob) -> int:
    return 0 if job.requested_token_ids is None else int(job.requested_token_ids.shape[1])


def _pack(
    job: ScoreJob,
    ids: np.ndarray,
    logprobs: np.ndarray,
    named: np.ndarray,
    tails: np.ndarray,
    index: int,
) -> SparseLogprobs:
    requested = None
    if job.requested_token_ids is not None:
        requested = _to_dtype(named[:, 1 : 1 + _width(job)], job.logprob_dtype)
    answer = SparseLogprobs(
        token_ids=ids[:, : job.top_k].astype(np.uint32),
        logprobs=_to_dtype(logprobs[:, : job.top_k], job.logprob_dtype),
        next_token_logprob=np.ascontiguousarray(named[:, 0]),
        tail_logprob=np.ascontiguousarray(tails),
        requested_logprobs=requested,
    )
    finite = np.isfinite(named[:, 0]) & (np.isfinite(tails) | np.isneginf(tails))
    if not (finite.all() and np.isfinite(answer.logprobs).all()):
        raise InternalError(
            f"the model's log-probs are not finite in a sequence of {job.tokens} tokens (number "
            f"{index} of its batch). Check the teacher's weights, or serve it with --dtype float32"
        )
    return answer


def _to_dtype(logprobs: np.ndarray, dtype: str) -> np.ndarray:
    """float16 ends at −65504: lower log-probs are answered as that, never as −inf."""
    if dtype == "float16":
        return np.maximum(logprobs, np.finfo(np.float16).min).astype(np.float16)
    return np.ascontiguousarray(logprobs)
