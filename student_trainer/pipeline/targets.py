"""The conversion of scored samples into the loss's targets at the learned positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.sparse import SparseLogprobs
from student_trainer.data.sample import Sample
from student_trainer.losses import HardLabels, SparseDistribution


@dataclass(frozen=True)
class ScoredSample:
    """A sample with the teacher's scores of its completion.

    Attributes:
        sample: token ids and which of them are learned.
        scores: None to learn the data itself (SFT).
        requested: [T, m] ids whose log-probs are in ``scores.requested_logprobs``, or None.
        sampled: the ids of ``scores`` are draws from the teacher, not its top-k.
        teacher: the name of the teacher that gave the scores; None for the first one.
        teacher_prompt_ids: [P'] the prompt that this teacher saw; None where it is the sample's.
    """

    sample: Sample
    scores: SparseLogprobs | None
    requested: NDArray[np.uint32] | None = None
    sampled: bool = False
    teacher: str | None = None
    teacher_prompt_ids: NDArray[np.uint32] | None = None


def sparse_distribution(scored: Sequence[ScoredSample], vocab_size: int) -> SparseDistribution:
    """Return the teacher's distributions [N, K] at the learned positions of all samples.

    The support of a position is the union of the teacher's top-k, the data's next token and the
    requested ids. All log-probs are exact, and the server's tail excludes every named id, so the
    masses sum to one. Teacher mass on ids from ``vocab_size`` on, outside the shared vocabulary,
    goes to the tail. Without scores the distribution is one-hot at the next token: forward KL to it
    is the cross-entropy of SFT.

    A sampled support, of all samples or none, gives an unbiased estimate instead: each drawn token
    has its share of the draws, and the tail is empty. See `_support_from_draws`.
    """
    parts = [_support(item, vocab_size) for item in scored]
    width = max(ids.shape[1] for ids, _, _ in parts)
    count = sum(len(ids) for ids, _, _ in parts)
    token_ids = np.full((count, width), -1, dtype=np.int64)  # [N, K]
    logprobs = np.full((count, width), -np.inf, dtype=np.float32)  # [N, K]
    first = 0
    for ids, values, _ in parts:
        last = first + len(ids)
        token_ids[first:last, : ids.shape[1]] = ids
        logprobs[first:last, : ids.shape[1]] = values
        first = last
    tails = np.concatenate([tail for _, _, tail in parts])
    offset = None
    if scored[0].sampled:
        shares = np.concatenate([logprobs, tails[:, None]], axis=1)
        offset = torch.from_numpy(_offsets(scored, shares))
    return SparseDistribution(
        torch.from_numpy(token_ids), torch.from_numpy(logprobs), torch.from_numpy(tails), offset
    )


def hard_labels(
    scored: Sequence[ScoredSample], sft_weight: float
) -> tuple[torch.Tensor | None, HardLabels]:
    """Return weights [N] of the divergences, and labels with the weights of their cross-entropy.

    The loss of a position is (1 − w)·divergence + w·cross-entropy, with w = ``sft_weight`` where
    the dataset or the teacher wrote the completion, and w = 0 where the student did.
    """
    masks = [item.sample.completion_mask for item in scored]
    ids = np.concatenate(
        [item.sample.completion_ids[mask] for item, mask in zip(scored, masks, strict=True)]
    )
    labels = torch.from_numpy(ids.astype(np.int64))
    if sft_weight == 0.0:
        return None, HardLabels(labels)
    share = np.concatenate(
        [
            np.full(int(mask.sum()), 0.0 if item.sample.source == "student" else sft_weight)
            for item, mask in zip(scored, masks, strict=True)
        ]
    )
    mixed = torch.from_numpy(share.astype(np.float32))
    return 1.0 - mixed, HardLabels(labels, mixed)


_Support = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


def _support(item: ScoredSample, vocab_size: int) -> _Support:
    """Return ids [n, K], log-probs [n, K] and tail [n] at the learned positions of one sample."""
    learned = item.sample.completion_mask
    next_ids = item.sample.completion_ids[learned].astype(np.int64)
    if item.scores is None:
        one_hot = np.zeros((len(next_ids), 1), dtype=np.float32)
        return next_ids[:, None], one_hot, np.full(len(next_ids), -np.inf, dtype=np.float32)
    if item.sampled:
        return _support_from_draws(item.scores, learned, vocab_size)
    scores = item.scores
    ids = [scores.token_ids[learned].astype(np.int64)]
    values = [scores.logprobs[learned]]
    if item.requested is not None:
        assert scores.requested_logprobs is not None  # the teacher's client has checked it
        ids.append(item.requested[learned].astype(np.int64))
        values.append(scores.requested_logprobs[learned])
    # The next token goes first, because its log-prob is float32 and the first of equal ids is kept.
    token_ids = np.concatenate([next_ids[:, None], *ids], axis=1)  # [n, 1 + k + m]
    token_ids[_repeats(token_ids)] = -1
    logprobs = np.concatenate(values, axis=1).astype(np.float32)
    logprobs[token_ids[:, 1:] < 0] = -np.inf
    next_logprob = scores.next_token_logprob[learned].astype(np.float32)  # [n]
    tail = scores.tail_logprob[learned].astype(np.float32)  # [n]
    if scores.logprobs.dtype == np.float16:
        logprobs = _renormalize(logprobs, np.logaddexp(next_logprob, tail))
    return _restrict_to_vocabulary(
        token_ids, np.concatenate([next_logprob[:, None], logprobs], axis=1), tail, vocab_size
    )


def _support_from_draws(
    scores: SparseLogprobs, learned: NDArray[np.bool_], vocab_size: int
) -> _Support:
    """Return a sampled support: drawn ids, logs of their shares of the draws, and empty tails.

    Forward KL to the shares c/n has the gradient Σ (c/n)·(q − onehot) / T, whose mean is that of
    the dense divergence: the draws follow the teacher's p already, so p is no further weight.

    Source: Random Sampling KD, arXiv 2503.16870, at a sampling temperature of 1.
    """
    ids = np.sort(scores.token_ids[learned].astype(np.int64), axis=1)  # [n, k]
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(new)  # starts of runs of one token; no run crosses a position's end
    log_shares = np.full(ids.size, -np.inf, dtype=np.float32)
    log_shares[starts] = np.log(np.diff(starts, append=ids.size) / ids.shape[1])
    tail = np.full(len(ids), -np.inf, dtype=np.float32)
    return _restrict_to_vocabulary(
        np.where(new, ids, -1), log_shares.reshape(ids.shape), tail, vocab_size
    )


def _offsets(
    scored: Sequence[ScoredSample], log_shares: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the nats [N] to add to KL(shares‖Q) so that its mean is KL(P‖Q).

    Shares of draws have less entropy than P, so KL(shares‖Q) is too high. The sum is
    Σ (c/n)·(log P − log Q), the same function of the student up to this constant.

    Args:
        log_shares: [N, K + 1], with the tail's in the last column.
    """
    drawn = [
        item.scores.logprobs[item.sample.completion_mask].astype(np.float64).mean(axis=1)
        for item in scored
        if item.scores is not None
    ]
    shares = np.exp(log_shares)
    own = (shares * np.where(shares > 0, log_shares, 0.0)).sum(axis=1)
    return (np.concatenate(drawn) - own).astype(np.float32)


def _renormalize(logprobs: NDArray[np.float32], rest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shift log-probs [n, K] sent as float16 until their mass is 1 − exp(``rest``) [n].

    ``rest`` is the log of the mass of the next token and the tail, which travel as float32.

    Rounding moves each by up to 2⁻¹¹ of itself and their sum by some 1e-4, so a divergence near
    zero would have an error of that size, and could be negative. All of a position are shifted by
    one amount, at most by what rounding can have moved their sum; the remaining error is of second
    order.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = np.log(-np.expm1(np.minimum(rest.astype(np.float64), 0.0)))  # [n]
        values = logprobs.astype(np.float64)
        found = np.log(np.exp(values).sum(axis=1))  # [n]
        share = np.exp(values - found[:, None])  # [n, k], of the named mass without ``rest``
        most = 2.0**-11 * np.nansum(share * np.abs(values), axis=1)  # [n], 0 · ∞ counts as 0
        shift = np.clip(np.nan_to_num(mass - found), -most, most)
    return logprobs + shift[:, None].astype(np.float32)


def _restrict_to_vocabulary(
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    tail: NDArray[np.float32],
    vocab_size: int,
) -> _Support:
    """Return the support without ids outside the shared vocabulary; their mass goes to the tail."""
    outside = ids >= vocab_size
    if outside.any():
        spilled = np.where(outside, logprobs, -np.inf)
        tail = np.logaddexp.reduce(np.concatenate([tail[:, None], spilled], axis=1), axis=1)
        ids, logprobs = np.where(outside, -1, ids), np.where(outside, -np.inf, logprobs)
    return ids, logprobs.astype(np.float32), tail.astype(np.float32)


def _repeats(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask [n, K], True where the same id is further left at the same position."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(repeated, order, again, axis=1)
    return repeated
