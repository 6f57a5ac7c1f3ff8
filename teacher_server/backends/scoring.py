"""Hidden states of completion rows -> sparse log-probs with an exact tail, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from shared.errors import InternalError
from shared.sparse import SparseLogprobs
from teacher_server.backends.base import ScoreJob

# Logits of one chunk in float32, of no more rows than a matrix product needs to be fast; their
# softmax comes on top.
CHUNK_BYTES = 128 << 20
CHUNK_ROWS = 256
# On a CPU a chunk is scored in slices that stay near the caches.
SLICE_BYTES = 16 << 20
# Neighbouring tokens that are ranked as one before the winners are ranked alone.
BLOCK = 32
# A tail's log-mass below which a sum of float32 probabilities is too coarse, or has gone to zero.
FAINT = -60.0

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
    plain = all(job.temperature == 1.0 for job in jobs)
    size = min(max(1, CHUNK_BYTES // (4 * vocab_size)), CHUNK_ROWS)
    slice_size = size if device.type != "cpu" else max(1, SLICE_BYTES // (4 * vocab_size))
    parts: list[tuple[torch.Tensor, ...]] = []
    for i in range(0, hidden.shape[0], size):
        logits = head(hidden[i : i + size]).float()
        if not plain:
            logits /= temperature[i : i + size]
        slices = zip(logits.split(slice_size), extra[i : i + size].split(slice_size), strict=True)
        parts.extend(_score_chunk(*one, k) for one in slices)
    return [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]


def _score_chunk(
    logits: torch.Tensor, extra: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(top ids [n, k], their log-probs [n, k], log-probs of ``extra`` [n, 1 + m], tail [n]).

    One pass of exponentials serves the normaliser and the tail. The tail is summed over what no
    column names, never taken as 1 − p.
    """
    values, ids = top_k(logits, k)  # [n, k], most probable first
    largest = values[:, :1]  # [n, 1]
    mass = logits.softmax(dim=-1)  # [n, V]
    first = mass.gather(1, ids[:, :1]).log()  # [n, 1], log-prob of the most probable token
    named = logits.gather(1, extra)  # [n, 1 + m]
    tail = mass.scatter_(1, ids, 0.0).scatter_(1, extra, 0.0).sum(dim=-1).log()  # [n]
    faint = tail < FAINT
    if faint.any():  # also a tail that is empty: the log-sum-exp of nothing is −inf
        rest = logits[faint].scatter_(1, ids[faint], -torch.inf)
        rest = rest.scatter_(1, extra[faint], -torch.inf).logsumexp(dim=-1)
        tail[faint] = rest - largest[faint, 0] + first[faint, 0]
    return ids, values - largest + first, named - largest + first, tail


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, ids), both [n, k], largest first: `torch.topk` of [n, V], in less time for small k.

    The k largest of a row lie in the k blocks whose own largest are largest, so only those are
    searched. Equal logits may stand in another order than torch's.
    """
    rows, vocab_size = logits.shape
    blocks = vocab_size // BLOCK
    left = vocab_size - blocks * BLOCK  # last columns, which fill no block
    if 2 * k > blocks:
        values, ids = logits.topk(k, dim=-1)
        return values, ids
    whole = logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))  # [n, V / B, B]
    best = whole.amax(dim=-1).topk(k, dim=-1, sorted=False).indices  # [n, k]
    row = torch.arange(rows, device=logits.device)[:, None]
    candidates = whole[row, best].flatten(1)  # [n, k · B]
    if left:
        candidates = torch.cat([candidates, logits[:, -left:]], dim=1)
    values, places = candidates.topk(k, dim=-1)
    inside = best.gather(1, (places // BLOCK).clamp_(max=k - 1)) * BLOCK + places % BLOCK
    ids = torch.where(places < k * BLOCK, inside, places - k * BLOCK + blocks * BLOCK)
    return values, ids


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
