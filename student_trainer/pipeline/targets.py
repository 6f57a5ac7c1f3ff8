"""Scored samples -> the teacher's `SparseDistribution`, row by row with the completion mask."""

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
    """A sample and what the teacher says of its rows.

    Attributes:
        sample: token ids and which of them are learned.
        scores: None is the data itself (SFT).
        requested: [T, m] ids whose log-probs stand in ``scores.requested_logprobs``, or None.
        sampled: the ids of ``scores`` are draws from the teacher, not its top-k.
    """

    sample: Sample
    scores: SparseLogprobs | None
    requested: NDArray[np.uint32] | None = None
    sampled: bool = False


def sparse_distribution(scored: Sequence[ScoredSample], vocab_size: int) -> SparseDistribution:
    """The learned rows of all samples, [N, K], over the shared vocabulary of ``vocab_size``.

    The support of a row is the teacher's top-k joined with the token that really came next and with
    the requested ids, no id twice. All of them are exact, and the server's tail leaves every named
    id out, so the union's masses and the tail sum to one. Teacher mass on ids outside the shared
    vocabulary goes to the tail. Where a sample has no scores its rows are one-hot at the next
    token: forward KL to them is the cross-entropy of SFT.

    Samples that are drawn, all of them or none, give an estimate without bias instead: each drawn
    token has the share of the draws that fell on it, and the tail is empty. See `_estimate`.
    """
    parts = [_support(item, vocab_size) for item in scored]
    width = max(ids.shape[1] for ids, _, _ in parts)
    rows = sum(len(ids) for ids, _, _ in parts)
    token_ids = np.full((rows, width), -1, dtype=np.int64)  # [N, K]
    logprobs = np.full((rows, width), -np.inf, dtype=np.float32)  # [N, K]
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
    """([N] weights of the divergences, labels): how the data is mixed into the loss.

    A row counts (1 − w)·divergence + w·cross-entropy with w = ``sft_weight`` where the dataset or
    the teacher wrote the completion. What the student wrote itself is no label: there w = 0.
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
    """(ids [n, K], log-probs [n, K], tail [n]) of the learned rows of one sample."""
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
        assert scores.requested_logprobs is not None  # the client checked
        ids.append(item.requested[learned].astype(np.int64))
        values.append(scores.requested_logprobs[learned])
    # The next token comes first: it is float32 always, and of equal ids the first is kept.
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
    """The drawn tokens and the log of each one's share of the draws; nothing is left for the tail.

    Forward KL to the shares c/n has the gradient Σ (c/n)·(q − onehot) / T, in the mean that of the
    dense divergence: the draws come from the teacher itself, so its own p weigh nothing further.

    Source: Random Sampling KD, arXiv 2503.16870, at a sampling temperature of 1.
    """
    ids = np.sort(scores.token_ids[learned].astype(np.int64), axis=1)  # [n, k]
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(new)  # of runs of one token, none of which goes over a row's end
    log_shares = np.full(ids.size, -np.inf, dtype=np.float32)
    log_shares[starts] = np.log(np.diff(starts, append=ids.size) / ids.shape[1])
    tail = np.full(len(ids), -np.inf, dtype=np.float32)
    return _restrict_to_vocabulary(
        np.where(new, ids, -1), log_shares.reshape(ids.shape), tail, vocab_size
    )


def _offsets(
    scored: Sequence[ScoredSample], log_shares: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[N] nats from KL(shares‖Q) to Σ (c/n)·(log P − log Q), whose mean is KL(P‖Q).

    Shares that were drawn have less entropy than what they were drawn from, so the first is too
    high. Both are the same function of the student, up to this number.

    Args:
        log_shares: [N, K + 1], those of the tail in the last column.
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
    """Log-probs [n, K] that travelled as float16, moved so that with ``rest`` [n] they sum to one.

    Rounding moves each by up to 2⁻¹¹ of itself and their sum by some 1e-4: a divergence near zero
    would be off by as much, and negative as often as not. All of a row are moved by one amount, by
    no more than rounding can have moved their sum; what is left of the error is of second order.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = np.log(-np.expm1(np.minimum(rest.astype(np.float64), 0.0)))  # [n]
        values = logprobs.astype(np.float64)
        found = np.log(np.exp(values).sum(axis=1))  # [n]
        share = np.exp(values - found[:, None])  # [n, k], of what the row names beside ``rest``
        most = 2.0**-11 * np.nansum(share * np.abs(values), axis=1)  # [n], 0 · ∞ counts nothing
        shift = np.clip(np.nan_to_num(mass - found), -most, most)
    return logprobs + shift[:, None].astype(np.float32)


def _restrict_to_vocabulary(
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    tail: NDArray[np.float32],
    vocab_size: int,
) -> _Support:
    """No id outside the shared vocabulary: that mass goes to the tail."""
    outside = ids >= vocab_size
    if outside.any():
        spilled = np.where(outside, logprobs, -np.inf)
        tail = np.logaddexp.reduce(np.concatenate([tail[:, None], spilled], axis=1), axis=1)
        ids, logprobs = np.where(outside, -1, ids), np.where(outside, -np.inf, logprobs)
    return ids, logprobs.astype(np.float32), tail.astype(np.float32)


def _repeats(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n, K]: whether the same id stands further left in the row."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(repeated, order, again, axis=1)
    return repeated
