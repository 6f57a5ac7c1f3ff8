"""Compute sparse log-probs with an exact tail from hidden states, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from shared.errors import InternalError
from shared.sampling import uniform_rows
from shared.sparse import SparseLogprobs
from teacher_server.backends.base import ScoreJob
from teacher_server.settings import Settings

# Bytes of float32 logits made at once (--score-chunk-mib), and the most positions, beyond which no
# matrix product gets faster.
CHUNK_BYTES = Settings.score_chunk_mib << 20
CHUNK_ROWS = 256
# On a CPU a chunk is scored in slices that fit the caches.
SLICE_BYTES = 4 << 20
# Tokens in a block of `top_k`, which ranks blocks before it ranks tokens.
BLOCK = 16
# Tail mass, relative to the most probable token's, below which a sum of float32 exponentials is too
# coarse or underflows.
FAINT = 1e-26

Head = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def score_positions(
    hidden: torch.Tensor,
    head: Head,
    jobs: Sequence[ScoreJob],
    vocab_size: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[SparseLogprobs]:
    """Score the completion positions of all jobs, chunk by chunk.

    Args:
        hidden: [N, d], the states of the jobs one after another: state t of a job predicts its
            token at ``completion_start + t``.
        head: projects [n, d] to logits [n, V], which may be overwritten.
        jobs: with any mixture of top_k, temperature, requested ids, dtypes and sampled supports.
        chunk_bytes: of float32 logits made at once; one position at least.

    Raises:
        InternalError: the model answered NaN or infinity for one of the jobs.
    """
    starts = np.cumsum([0, *(job.rows for job in jobs)])  # where each job begins in ``hidden``
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault((job.top_k, _width(job), job.draw_key is None), []).append(index)
    answers: dict[int, SparseLogprobs] = {}
    # Jobs are grouped by k, so that neither an answer nor its memory depends on the other jobs of
    # the batch: which of two equal tokens ranks first may depend on k.
    for members in alike.values():
        indices = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        states = hidden[torch.from_numpy(indices).to(hidden.device)]
        alike_jobs = [jobs[i] for i in members]
        arrays = _score_alike(states, head, alike_jobs, vocab_size, chunk_bytes)
        last = 0
        for index in members:
            first, last = last, last + jobs[index].rows
            answers[index] = _pack(jobs[index], *(array[first:last] for array in arrays))
    return [answers[index] for index in range(len(jobs))]


def _score_alike(
    hidden: torch.Tensor,
    head: Head,
    jobs: Sequence[ScoreJob],
    vocab_size: int,
    chunk_bytes: int,
) -> list[np.ndarray]:
    """Return the arrays of `_score_chunk` for all positions of jobs with equal k, m and support."""
    device = hidden.device
    k = jobs[0].top_k
    extra = torch.from_numpy(_extra_ids(jobs)).to(device)  # [N, 1 + m]: next token, requested
    temperature = torch.tensor(
        [job.temperature for job in jobs for _ in range(job.rows)], device=device
    )[:, None]  # [N, 1]
    points = torch.from_numpy(_points(jobs)).to(device)  # [N, k]; [N, 0] for the top k
    plain = all(job.temperature == 1.0 for job in jobs)
    size = min(max(1, chunk_bytes // (4 * vocab_size)), CHUNK_ROWS)
    slice_size = size if device.type != "cpu" else max(1, SLICE_BYTES // (4 * vocab_size))
    parts: list[tuple[torch.Tensor, ...]] = []
    for i in range(0, hidden.shape[0], size):
        logits = head(hidden[i : i + size]).float()
        if not plain:
            logits /= temperature[i : i + size]
        columns = (logits, extra[i : i + size], points[i : i + size])
        slices = zip(*(column.split(slice_size) for column in columns), strict=True)
        parts.extend(
            _score_chunk(some_logits, some_extra, some_points, k)
            for some_logits, some_extra, some_points in slices
        )
    return [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]


def _score_chunk(
    logits: torch.Tensor, extra: torch.Tensor, points: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids [n, k], their log-probs [n, k], log-probs of ``extra`` [n, 1 + m], tail [n].

    The ids are the most probable ones, or with ``points`` [n, k] the draws at those points.
    Overwrites ``logits``. The tail is exact: it sums the exponentials of all tokens that no column
    names, and is never 1 − p. Tail and named tokens, each counted once, make the normaliser.
    """
    widths = [extra.shape[1], points.shape[1]]
    if points.shape[1]:  # draws may repeat, so they are scored like requested ids and not ranked
        drawn = draw(logits, points)
        extra = torch.cat([extra, drawn], dim=1)
        values, ids = logits.new_empty((len(logits), 0)), drawn[:, :0]
        largest = logits.amax(dim=1, keepdim=True)  # [n, 1]
    else:
        values, ids = top_k(logits, k)  # [n, k], most probable first
        largest = values[:, :1].clone()  # [n, 1]
    named = logits.gather(1, extra)  # [n, 1 + m], and the draws
    values -= largest
    named -= largest
    logits.scatter_(1, ids, -torch.inf)
    ordered = extra.sort(dim=1).values
    beside = logits.gather(1, ordered) - largest  # like named, but −inf for ids in the top k
    again = ordered[:, 1:] == ordered[:, :-1]  # an id named twice counts once
    beside[:, 1:].masked_fill_(again, -torch.inf)
    logits.scatter_(1, extra, -torch.inf)
    rest = (logits - largest).exp_().sum(dim=-1)  # [n]
    total = rest + values.exp().sum(dim=-1) + beside.exp().sum(dim=-1)
    normalizer = total.log()
    tail = rest.log() - normalizer
    faint = rest < FAINT
    if faint.any():  # an empty tail too, whose log-sum-exp is −inf
        tail[faint] = logits[faint].logsumexp(dim=-1) - largest[faint, 0] - normalizer[faint]
    logprobs = values - normalizer[:, None]
    named -= normalizer[:, None]
    if points.shape[1]:
        ids = drawn
        named, logprobs = named.split(widths, dim=1)
    return ids, logprobs, named, tail


def draw(logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Draw ids [n, k] from softmax(``logits`` [n, V]) at ``points`` [n, k] from 0 to 1.

    The cumulative distribution is inverted in float64: in float32 it would have steps of 6e-8, and
    improbable tokens would be drawn too often or never.
    """
    weights = (logits - logits.amax(dim=1, keepdim=True)).exp_()
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return ids.clamp_max_(logits.shape[1] - 1)  # out of range only where logits are not finite


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, ids), both [n, k], largest first, faster than `torch.topk` for small k.

    The k largest of [n, V] logits lie in the k blocks whose own largest are largest, so only those
    are searched. A block is every (V / BLOCK)-th token, so that maxima over blocks read contiguous
    memory. Equal logits may come in another order than torch's.
    """
    count, vocab_size = logits.shape
    blocks = vocab_size // BLOCK
    left = vocab_size - blocks * BLOCK  # last columns, which fill no block
    if 2 * k > blocks:
        values, ids = logits.topk(k, dim=-1)
        return values, ids
    whole = logits[:, : blocks * BLOCK].unflatten(1, (BLOCK, blocks))  # [n, B, V / B]
    best = whole.amax(dim=1).topk(k, dim=-1, sorted=False).indices  # [n, k]
    steps = torch.arange(0, blocks * BLOCK, blocks, device=logits.device)
    candidates = (best[:, :, None] + steps).flatten(1)  # [n, k · B] token ids
    if left:
        last = torch.arange(blocks * BLOCK, vocab_size, device=logits.device)
        candidates = torch.cat([candidates, last.expand(count, left)], dim=1)
    values, places = logits.gather(1, candidates).topk(k, dim=-1)
    return values, candidates.gather(1, places)


def _extra_ids(jobs: Sequence[ScoreJob]) -> np.ndarray:
    """Return ids [N, 1 + m], int64: the next token, then the requested ids."""
    parts = []
    for job in jobs:
        ids = job.token_ids[job.completion_start :].astype(np.int64)[:, None]
        if job.requested_token_ids is not None:
            ids = np.concatenate([ids, job.requested_token_ids.astype(np.int64)], axis=1)
        parts.append(ids)
    return np.concatenate(parts)


def _points(jobs: Sequence[ScoreJob]) -> np.ndarray:
    """Return the points [N, k], float64, of each position's draws; [N, 0] for the top k."""
    if jobs[0].draw_key is None:
        return np.empty((sum(job.rows for job in jobs), 0))
    parts = []
    for job in jobs:
        assert job.draw_key is not None
        # Fixed by the position in the sequence, because vLLM may score a sequence in several steps.
        first, positions = job.completion_start, job.rows
        parts.append(uniform_rows(job.draw_key, first=first, rows=positions, width=job.top_k))
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
    """Convert log-probs to a dtype; in float16 lower ones than −65504 become that, never −inf."""
    if dtype == "float16":
        return np.maximum(logprobs, np.finfo(np.float16).min).astype(np.float16)
    return np.ascontiguousarray(logprobs)
