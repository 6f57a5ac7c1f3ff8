"""The closed form of the sparse divergence and its gradient on a chunk of logits, in PyTorch.

It is the reference of every fast path. The outcomes are the tokens of the support and one tail τ:
all other tokens, for teacher and student. The student is always normalised over the full
vocabulary. `triton` is the same on a GPU in one kernel; `kernels` chooses between them.
"""

from __future__ import annotations

import math

import torch

from student_trainer.losses.distribution import HardLabels, SparseDistribution
from student_trainer.losses.divergence import Divergence, LossOutput, SparseStatistics

ROW_MULTIPLE = 1  # rows of logits need no padding
CACHE_BYTES = 2 << 20  # a block of logits of this size stays in a CPU core's cache between passes


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits of ``dtype`` are computed and their gradient is written."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def divergence_and_gradient(
    logits: torch.Tensor,
    teacher: SparseDistribution,
    divergence: Divergence,
    *,
    scale: float = 1.0,
    weights: torch.Tensor | None = None,
    labels: HardLabels | None = None,
    softcap: float | None = None,
    with_gradient: bool,
    out: torch.Tensor | None = None,
) -> LossOutput:
    """Return weighted divergence plus cross-entropy of each position; ``logits`` is overwritten.

    With P and Q over the outcomes b, q the student's softmax and h_b = ∂D/∂Q_b,

        ∂D/∂z_v = q_v·(h_b(v) − Σ_b Q_b h_b) / T

    where h = −P/Q for β = 0, h = log Q − log P for β = 1 and h = (1−β)(log Q − log M) between.
    Because Σ_b Q_b = 1, subtracting a constant from h changes nothing: the h of the student's most
    probable outcome is subtracted, or float32 would lose most digits of a large h minus its mean.
    Summed over the tokens of an outcome the gradient is (Q_b·h_b − Q_b Σ_b Q_b h_b) / T: an outcome
    of the support is one token, and the tail's share is spread by the student's softmax within the
    tail. The cross-entropy at label y adds (q_v − [v = y]) / T, spread the same way. Soft-capping
    replaces z by c·tanh(z/c) and multiplies the gradient by 1 − tanh²(z/c).

    Args:
        logits: [N, V] float32 or float64; on return ``scale`` times the gradient with
            respect to it, or scratch without ``with_gradient``.
        teacher, weights, labels: of N positions, checked by the caller.
        softcap: c, or None; needs a second matrix like ``logits``.
        out: [N, V] of any floating dtype, takes the gradient; ``logits`` is then scratch.

    Returns:
        weight · divergence + label weight · cross-entropy [N], and the statistics.
    """
    beta, temperature = divergence.beta, divergence.temperature
    slopes = None
    if softcap is not None:
        slopes = torch.div(logits, softcap).tanh_()
        torch.mul(slopes, softcap, out=logits)
        slopes.square_().neg_().add_(1.0)
    lowest = _lowest(logits.dtype)
    valid = teacher.token_ids >= 0  # [N, K]
    log_p, log_p_tail = _finite_log_masses(teacher, valid, logits.dtype)  # [N, K], [N]
    best = log_p.masked_fill(~valid, -math.inf).argmax(dim=-1, keepdim=True)  # [N, 1]
    # Pads repeat the best token's id, so scattering to the support writes the same value twice.
    best_id = teacher.token_ids.gather(1, best).clamp_min(0)
    ids = torch.where(valid, teacher.token_ids, best_id)  # [N, K]
    exists = valid.sum(dim=-1) < logits.shape[1]  # [N] the tail holds at least one token

    label_logits = None if labels is None else logits.gather(1, labels.token_ids[:, None])
    # The student's tail and support are each taken relative to their own maximum, so that neither
    # underflows.
    on_support = logits.gather(1, ids)  # [N, K]
    _scatter_support(logits, ids, torch.full_like(on_support, -math.inf), valid, best)
    tail_maximum, tail_sum = _exponentiate(logits, temperature)  # [N, 1], [N]
    exponentials = logits  # [N, V], 0 on the support; they sum to at least 1 if there is a tail

    # Both are then taken relative to the maximum of all tokens, because large logits lose digits.
    on_support.masked_fill_(~valid, -math.inf)
    maximum = torch.maximum(on_support.amax(dim=-1, keepdim=True), tail_maximum)  # [N, 1]
    on_support.sub_(maximum).div_(temperature)
    tail_log_sum = (tail_maximum - maximum).squeeze(1) / temperature + tail_sum.log()  # [N]
    support_log_sum = on_support.logsumexp(dim=-1)  # [N]
    log_total = torch.logaddexp(tail_log_sum, support_log_sum)  # [N]
    log_q = on_support - log_total[:, None]  # [N, K]
    log_q_tail = tail_log_sum - log_total  # [N]
    student_mass = (support_log_sum - log_total).exp()
    if label_logits is None:
        cross_entropy = torch.full_like(log_total, math.nan)
    else:
        cross_entropy = log_total - (label_logits - maximum).squeeze(1) / temperature
    agrees = on_support.gather(1, best).squeeze(1) == 0.0

    teacher_mass = log_p.exp().masked_fill_(~valid, 0.0).sum(dim=-1)

    # The outcomes are the support and, in the last column, the tail.
    present = torch.cat([valid, exists[:, None]], dim=1)  # [N, K+1]
    log_p = torch.cat([log_p, log_p_tail[:, None]], dim=1).masked_fill_(~present, 0.0)
    log_q = torch.cat([log_q, log_q_tail[:, None]], dim=1).masked_fill_(~present, 0.0)
    log_q.clamp_min_(lowest)
    p = log_p.exp().masked_fill_(~present, 0.0)
    q = log_q.exp().masked_fill_(~present, 0.0)
    teacher_entropy, student_entropy = -(p * log_p).sum(1), -(q * log_q).sum(1)
    coarse = valid.sum(dim=-1) + 1 < logits.shape[1]  # [N] the tail is more than one token
    gap = _gap_bound(log_p[:, -1], log_q[:, -1], teacher.tail_logprob, beta)
    gap = torch.where(coarse, gap, 0.0)
    kept_log_p, kept_p, kept_log_q, kept_q = log_p, p, log_q, q
    if divergence.tail == "renormalize":
        gap = torch.where(exists, math.inf, 0.0)
        present[:, -1] = False
        kept_log_p, kept_p = _renormalized(log_p, present)
        kept_log_q, kept_q = _renormalized(log_q, present)

    values, gradient = _divergence_over_outcomes(kept_log_p, kept_p, kept_log_q, kept_q, beta)
    objective = values if weights is None else values * weights
    label_weights = None if labels is None else labels.weights
    if label_weights is not None:
        objective = objective + label_weights * cross_entropy
    if with_gradient:
        if weights is not None:
            gradient *= weights[:, None]
        if label_weights is not None:
            gradient += label_weights[:, None] * q
        gradient *= scale / temperature
        exponentials.mul_((gradient[:, -1] / tail_sum.clamp_min(1.0))[:, None])
        _scatter_support(exponentials, ids, gradient[:, :-1], valid, best)
        if labels is not None and label_weights is not None:
            at = labels.token_ids[:, None]  # [N, 1]
            pull = (label_weights * (scale / temperature))[:, None].to(logits.dtype)
            exponentials.scatter_(1, at, exponentials.gather(1, at) - pull)
        if slopes is not None:
            exponentials *= slopes
        if out is not None:
            out.copy_(exponentials)
    columns = (
        values, teacher_mass, student_mass, teacher_entropy, student_entropy, agrees,
        cross_entropy, gap,
    )  # fmt: skip
    # Copies: the objective may be the same tensor, and only the statistics are non-differentiable.
    statistics = SparseStatistics(*(c.to(torch.float32, copy=True) for c in columns))
    return LossOutput(objective.to(logits.dtype), statistics)


def _finite_log_masses(
    teacher: SparseDistribution, valid: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's log-masses of support [N, K] and tail [N], with −∞ made finite.

    A mass of 0 becomes the smallest normal number, or the position's smallest mass if that is
    lower, so that reverse KL is finite and 0 never exceeds another mass.
    """
    log_p = torch.cat([teacher.logprobs, teacher.tail_logprob[:, None]], dim=1).to(dtype)
    log_p[:, :-1].masked_fill_(~valid, 0.0)
    none = log_p.isneginf()
    floor = log_p.masked_fill(none, 0.0).amin(dim=1, keepdim=True)
    floor.clamp_(min=_lowest(dtype), max=math.log(torch.finfo(dtype).tiny))
    log_p = torch.where(none, floor, log_p).clamp_min(_lowest(dtype))
    return log_p[:, :-1], log_p[:, -1]


def _lowest(dtype: torch.dtype) -> float:
    """Return the finite number that replaces −inf, so that 0·log 0 is 0."""
    return torch.finfo(dtype).min / 4


def _exponentiate(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace logits by exp((z − maximum)/T); return the maxima [N, 1] and the sums [N].

    These are four passes over [N, V]. On a CPU they are done for a few positions at a time, so that
    the logits are read from memory once and written once.
    """
    block_size = len(logits)
    if logits.device.type == "cpu":
        block_size = CACHE_BYTES // (logits.shape[1] * logits.element_size())
    maxima, sums = logits.new_empty((len(logits), 1)), logits.new_empty(len(logits))
    blocks = (tensor.split(max(1, block_size)) for tensor in (logits, maxima, sums))
    for block, maximum, total in zip(*blocks, strict=True):
        torch.amax(block, dim=-1, keepdim=True, out=maximum).clamp_min_(_lowest(logits.dtype))
        block.sub_(maximum)
        if temperature != 1.0:
            block.div_(temperature)
        torch.sum(block.exp_(), dim=-1, out=total)
    return maxima, sums


def _gap_bound(
    log_p_tail: torch.Tensor, log_q_tail: torch.Tensor, given: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return an upper bound [N] of dense minus sparse divergence, from the tail masses alone.

    By the chain rule the two differ by a divergence within the tail,

        D_dense − D = M_τ·JSD_λ(P(·|τ), Q(·|τ)) with M_τ = βP_τ + (1−β)Q_τ, λ = βP_τ/M_τ

    and JSD_λ is at most the entropy of a coin that falls λ : 1−λ, reached where the two are
    disjoint. For β = 0 the difference is P_τ·KL(P(·|τ)‖Q(·|τ)), for β = 1 Q_τ·KL(Q(·|τ)‖P(·|τ)):
    no masses bound those, unless that side's tail is empty.
    """
    if beta == 0.0:
        return torch.where(given.isneginf(), 0.0, math.inf)
    if beta == 1.0:
        return torch.full_like(log_q_tail, math.inf)
    ours, theirs = log_q_tail + math.log1p(-beta), log_p_tail + math.log(beta)
    log_m = torch.logaddexp(ours, theirs)
    return ours.exp() * (log_m - ours) + theirs.exp() * (log_m - theirs)


def _divergence_over_outcomes(
    log_p: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return divergence [N] and Q·(h − Σ Q·h) [N, K+1]; absent outcomes have p = q = 0."""
    if beta == 0.0:
        return (p * (log_p - log_q)).sum(1), q * p.sum(1, keepdim=True) - p
    if beta == 1.0:
        slope = log_q - log_p
        return (q * slope).sum(1), _centred(slope, q)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    slope = (1.0 - beta) * (log_q - log_m)
    return (beta * p * (log_p - log_m) + q * slope).sum(1), _centred(slope, q)


def _centred(slope: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return Q·(h − Σ Q·h) [N, K+1] for h = ``slope`` minus that of the heaviest outcome."""
    slope = slope - slope.gather(1, q.argmax(dim=1, keepdim=True))
    return q * (slope - (q * slope).sum(dim=1, keepdim=True))


def _renormalized(
    log_mass: torch.Tensor, present: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-masses and masses [N, K+1] of the present outcomes, scaled to sum to one."""
    kept = log_mass.masked_fill(~present, -math.inf)
    log_mass = (kept - kept.logsumexp(dim=-1, keepdim=True)).masked_fill(~present, 0.0)
    return log_mass, log_mass.exp().masked_fill(~present, 0.0)


def _scatter_support(
    matrix: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    best: torch.Tensor,
) -> None:
    """Set matrix[n, ids[n, k]] = values[n, k]; pads repeat the best token, or change nothing."""
    unchanged = matrix.gather(1, ids.gather(1, best))  # [N, 1], for positions without any support
    repeated = torch.where(valid.any(dim=-1, keepdim=True), values.gather(1, best), unchanged)
    matrix.scatter_(1, ids, torch.where(valid, values, repeated))
