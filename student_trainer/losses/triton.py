"""The closed form as one Triton kernel: one program per position, two passes over the vocabulary.

The first pass is an online log-sum-exp over the tail. Each lane keeps a maximum and a sum of its
own, so the lanes wait for each other once, after the pass. Then the K + 1 outcomes are computed in
registers. The second pass writes the gradient. Both passes load a block while they compute the one
before it. Logits and gradient are read and written in their own floating dtypes, and the arithmetic
is float32. There are no atomics, so the same input gives the same bits.

The mathematics and its names are those of `closed_form.divergence_and_gradient`, the reference.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from student_trainer.losses.distribution import HardLabels, SparseDistribution
from student_trainer.losses.divergence import Divergence, LossOutput, SparseStatistics

BLOCK_V = 4096  # tokens in registers at once
NUM_WARPS = 8
# Columns of a block. Each thread has 8, the bfloat16 numbers in a load of 16 bytes; with fewer
# columns a block's rows would be split between threads, which then wait for each other.
LANES = 32 * NUM_WARPS * 8
ROW_MULTIPLE = 16  # elements, so that rows are read and written 16 bytes at a time
_LOWEST = torch.finfo(torch.float32).min / 4  # in place of −inf, so that 0·log 0 is 0
_FLOOR = math.log(torch.finfo(torch.float32).tiny)
_COLUMNS = 1 + len(SparseStatistics.__dataclass_fields__)  # the objective, then the statistics


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``: the kernel reads and writes half precision too."""
    return dtype


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
    """Compute as `closed_form.divergence_and_gradient`, on float32, bfloat16 or float16 logits.

    Rows of ``logits`` and ``out`` may be padded to a stride that `ROW_MULTIPLE` divides. Padding is
    overwritten.
    """
    beta, temperature = divergence.beta, divergence.temperature
    count, vocab_size = logits.shape
    # Triton's interpreter cuts float32 to bfloat16, where a GPU rounds.
    cut = out is not None and out.dtype == torch.bfloat16 and not out.is_cuda
    gradient = logits if out is None or cut else out
    for name, matrix in (("logits", logits), ("out", gradient)):
        if matrix.stride(1) != 1 or matrix.stride(0) < vocab_size:
            raise ValueError(f"{name} must have contiguous rows, got strides {matrix.stride()}")
    # A mask that ends within 16 elements would have them all read one by one.
    aligned = all(matrix.stride(0) % ROW_MULTIPLE == 0 for matrix in (logits, gradient))
    width = triton.cdiv(vocab_size, ROW_MULTIPLE) * ROW_MULTIPLE if aligned else vocab_size
    block_v = min(BLOCK_V, max(16, triton.next_power_of_2(vocab_size)))
    support = teacher.token_ids.shape[1]
    columns = torch.empty((_COLUMNS, count), dtype=torch.float32, device=logits.device)
    unused = columns  # a valid pointer for absent arguments, which the kernel never reads
    label_weights = None if labels is None else labels.weights
    if count:
        _kernel[(count,)](
            logits,
            gradient,
            teacher.token_ids.contiguous(),
            teacher.logprobs.float().contiguous(),
            teacher.tail_logprob.float().contiguous(),
            unused if weights is None else weights.float().contiguous(),
            unused if labels is None else labels.token_ids.contiguous(),
            unused if label_weights is None else label_weights.float().contiguous(),
            columns,
            logits.stride(0),
            gradient.stride(0),
            count,
            vocab_size,
            width,
            support,
            beta,
            math.log(beta) if beta > 0.0 else 0.0,
            math.log1p(-beta) if beta < 1.0 else 0.0,
            1.0 / temperature,
            scale / temperature,
            1.0 if softcap is None else softcap,
            MODE=0 if beta == 0.0 else 1 if beta == 1.0 else 2,
            RENORMALIZE=divergence.tail == "renormalize",
            WEIGHTED=weights is not None,
            LABELLED=labels is not None,
            LABEL_WEIGHTED=label_weights is not None,
            CAPPED=softcap is not None,
            GRADIENT=with_gradient,
            LOWEST=_LOWEST,
            FLOOR=_FLOOR,
            BLOCK_K=max(16, triton.next_power_of_2(support)),
            ROWS=max(1, block_v // LANES),
            LANES=min(block_v, LANES),
            num_warps=NUM_WARPS,
        )
    if out is not None and cut:
        out.copy_(logits)
    return LossOutput(columns[0], SparseStatistics(*columns[1:]))


@triton.jit
def _cap(z, c):
    """Return c·tanh(z/c) and 1 − tanh²(z/c); −inf, which marks the support, stays."""
    t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / c))
    return tl.where(z == -float("inf"), z, c * t), 1.0 - t * t


@triton.jit
def _add_logs(a, b):
    """Return log(exp a + exp b) of finite a and b."""
    high = tl.maximum(a, b)
    return high + tl.log(tl.exp(a - high) + tl.exp(b - high))


@triton.jit
def _kernel(
    logits_at,  # [N, V]
    gradient_at,  # [N, V], which may be the same
    ids_at,  # [N, K]
    logprobs_at,  # [N, K]
    tail_at,  # [N]
    weights_at,  # [N]
    labels_at,  # [N]
    label_weights_at,  # [N]
    out_at,  # [columns, N]
    logits_stride,
    gradient_stride,
    count,
    vocab_size,
    width,  # of a row with the padding that is read and written too
    support,
    beta,
    log_beta,
    log_rest,
    inverse_t,
    scale,
    softcap,
    MODE: tl.constexpr,  # 0 forward KL, 1 reverse KL, 2 between
    RENORMALIZE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LABELLED: tl.constexpr,
    LABEL_WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    LOWEST: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    line = logits_at + position * logits_stride
    target = gradient_at + position * gradient_stride
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_at + position * support + k, mask=k < support, other=-1)
    valid = ids >= 0
    named = tl.sum(valid.to(tl.int32), axis=0)

    log_p = tl.load(logprobs_at + position * support + k, mask=valid, other=0.0)
    given_tail = tl.load(tail_at + position)
    # The log of a mass of 0 becomes finite, and no higher than any other of this position.
    none, no_tail = log_p == -float("inf"), given_tail == -float("inf")
    least = tl.minimum(tl.min(tl.where(none, 0.0, log_p), axis=0), FLOOR)
    least = tl.maximum(tl.minimum(least, tl.where(no_tail, 0.0, given_tail)), LOWEST)
    log_p = tl.where(valid, tl.maximum(tl.where(none, least, log_p), LOWEST), 0.0)
    p = tl.where(valid, tl.exp(log_p), 0.0)
    exists = named < vocab_size
    log_p_tail = tl.where(no_tail, least, tl.maximum(given_tail, LOWEST))
    log_p_tail = tl.where(exists, log_p_tail, 0.0)
    p_tail = tl.where(exists, tl.exp(log_p_tail), 0.0)

    # The support's logits become −inf, so that the passes over the vocabulary see only the tail.
    z = tl.load(line + ids, mask=valid, other=0.0).to(tl.float32)
    slope = tl.full([BLOCK_K], 1.0, tl.float32)
    if CAPPED:
        z, slope = _cap(z, softcap)
    z = tl.where(valid, z, -float("inf"))
    label = tl.full([], -1, tl.int64)
    z_label = 0.0
    if LABELLED:
        label = tl.load(labels_at + position)
        z_label = tl.load(line + label).to(tl.float32)
        if CAPPED:
            z_label, _label_slope = _cap(z_label, softcap)
    tl.debug_barrier()  # all reads are done before the writes
    tl.store(line + ids, tl.full([BLOCK_K], -float("inf"), tl.float32), mask=valid)
    tl.debug_barrier()  # all writes are done before the reads

    # Online log-sum-exp: each lane's maximum so far, and the sum of exponentials relative to it.
    block = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [rows, lanes]
    lane_max = tl.full([LANES], LOWEST, tl.float32)
    lane_sum = tl.full([LANES], 0.0, tl.float32)
    ahead = tl.load(line + block, mask=block < width, other=-float("inf"))
    for first in range(0, width, ROWS * LANES):
        v = first + block
        x = tl.where(v < vocab_size, ahead.to(tl.float32), -float("inf"))
        later = v + ROWS * LANES  # loaded before anything waits for this block
        ahead = tl.load(line + later, mask=later < width, other=-float("inf"))
        if CAPPED:
            x, _slopes = _cap(x, softcap)
        higher = tl.maximum(lane_max, tl.max(x, axis=0))
        lane_sum *= tl.exp((lane_max - higher) * inverse_t)
        lane_sum += tl.sum(tl.exp((x - higher[None, :]) * inverse_t), axis=0)
        lane_max = higher
    tail_max = tl.max(lane_max, axis=0)
    tail_sum = tl.sum(lane_sum * tl.exp((lane_max - tail_max) * inverse_t), axis=0)

    best_z = tl.max(z, axis=0)
    maximum = tl.maximum(best_z, tail_max)
    on_support = tl.where(valid, (z - maximum) * inverse_t, -float("inf"))
    # The support is summed relative to its own maximum, because it may underflow otherwise.
    own = tl.maximum(best_z, LOWEST)
    own_sum = tl.sum(tl.where(valid, tl.exp((z - own) * inverse_t), 0.0), axis=0)
    support_log_sum = tl.where(
        named > 0, (own - maximum) * inverse_t + tl.log(tl.maximum(own_sum, 1.0)), LOWEST
    )
    tail_log_sum = tl.where(
        exists, (tail_max - maximum) * inverse_t + tl.log(tl.maximum(tail_sum, 1.0)), LOWEST
    )
    log_total = _add_logs(tail_log_sum, support_log_sum)
    log_q = tl.where(valid, tl.maximum(on_support - log_total, LOWEST), 0.0)
    q = tl.where(valid, tl.exp(log_q), 0.0)
    log_q_tail = tl.where(exists, tl.maximum(tail_log_sum - log_total, LOWEST), 0.0)
    q_tail = tl.where(exists, tl.exp(log_q_tail), 0.0)

    teacher_mass = tl.sum(p, axis=0)
    student_mass = tl.exp(support_log_sum - log_total)
    teacher_entropy = -(tl.sum(p * log_p, axis=0) + p_tail * log_p_tail)
    student_entropy = -(tl.sum(q * log_q, axis=0) + q_tail * log_q_tail)
    best = tl.argmax(tl.where(valid, log_p, -float("inf")), axis=0)
    teachers_best = tl.max(tl.where(valid & (k == best), z, -float("inf")), axis=0)
    agrees = (teachers_best == maximum).to(tl.float32)
    cross_entropy = float("nan")
    if LABELLED:
        cross_entropy = log_total - (z_label - maximum) * inverse_t

    if MODE == 0:
        gap = tl.where(given_tail == -float("inf"), 0.0, float("inf"))
    elif MODE == 1:
        gap = float("inf")
    else:
        ours, theirs = log_q_tail + log_rest, log_p_tail + log_beta
        both = _add_logs(ours, theirs)
        gap = tl.exp(ours) * (both - ours) + tl.exp(theirs) * (both - theirs)
    gap = tl.where(named + 1 < vocab_size, gap, 0.0)
    full_q, full_q_tail = q, q_tail
    if RENORMALIZE:
        gap = tl.where(exists, float("inf"), 0.0)
        high = tl.max(tl.where(valid, log_p, LOWEST), axis=0)
        own_sum_p = tl.sum(tl.where(valid, tl.exp(log_p - high), 0.0), axis=0)
        log_sum_p = high + tl.log(tl.maximum(own_sum_p, 1.0))
        log_p = tl.where(valid, log_p - log_sum_p, 0.0)
        p = tl.where(valid, tl.exp(log_p), 0.0)
        log_q = tl.where(valid, log_q - (support_log_sum - log_total), 0.0)
        q = tl.where(valid, tl.exp(log_q), 0.0)
        log_p_tail, p_tail, log_q_tail, q_tail = 0.0, 0.0, 0.0, 0.0

    # The divergence, and Q·(h − Σ Q·h) of each outcome, as in `_divergence_over_outcomes`.
    if MODE == 0:
        divergence = tl.sum(p * (log_p - log_q), axis=0) + p_tail * (log_p_tail - log_q_tail)
        mass = tl.sum(p, axis=0) + p_tail
        centred, centred_tail = q * mass - p, q_tail * mass - p_tail
    else:
        if MODE == 1:
            h, h_tail = log_q - log_p, log_q_tail - log_p_tail
            divergence = tl.sum(q * h, axis=0) + q_tail * h_tail
        else:
            log_m = _add_logs(log_p + log_beta, log_q + log_rest)
            log_m_tail = _add_logs(log_p_tail + log_beta, log_q_tail + log_rest)
            h, h_tail = (1.0 - beta) * (log_q - log_m), (1.0 - beta) * (log_q_tail - log_m_tail)
            ours = tl.sum(q * h, axis=0) + q_tail * h_tail
            theirs = tl.sum(p * (log_p - log_m), axis=0) + p_tail * (log_p_tail - log_m_tail)
            divergence = beta * theirs + ours
        # h is taken relative to the heaviest outcome's (Σ Q = 1), because large h would cancel.
        first = tl.argmax(q, axis=0)
        h_first = tl.sum(tl.where(k == first, h, 0.0), axis=0)
        h_first = tl.where(q_tail > tl.max(q, axis=0), h_tail, h_first)
        h, h_tail = h - h_first, h_tail - h_first
        mean = tl.sum(q * h, axis=0) + q_tail * h_tail
        centred, centred_tail = q * (h - mean), q_tail * (h_tail - mean)

    objective = divergence
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_at + position)
        objective = divergence * weight
    share = 0.0
    if LABEL_WEIGHTED:
        share = tl.load(label_weights_at + position)
        objective += share * cross_entropy
    tl.store(out_at + position, objective)
    tl.store(out_at + count + position, divergence)
    tl.store(out_at + 2 * count + position, teacher_mass)
    tl.store(out_at + 3 * count + position, student_mass)
    tl.store(out_at + 4 * count + position, teacher_entropy)
    tl.store(out_at + 5 * count + position, student_entropy)
    tl.store(out_at + 6 * count + position, agrees)
    tl.store(out_at + 7 * count + position, cross_entropy)
    tl.store(out_at + 8 * count + position, gap)

    if GRADIENT:
        gradient = scale * (weight * centred + share * full_q)
        tail_gradient = scale * (weight * centred_tail + share * full_q_tail)
        spread = tail_gradient / tl.maximum(tail_sum, 1.0)
        ahead = tl.load(line + block, mask=block < width, other=-float("inf"))
        for first in range(0, width, ROWS * LANES):
            v = first + block
            x = tl.where(v < vocab_size, ahead.to(tl.float32), -float("inf"))
            later = v + ROWS * LANES  # before the store, over which no compiler moves a load
            ahead = tl.load(line + later, mask=later < width, other=-float("inf"))
            bend = 1.0
            if CAPPED:
                x, bend = _cap(x, softcap)
            change = tl.exp((x - tail_max) * inverse_t) * spread
            if LABEL_WEIGHTED:
                change = tl.where(v == label, change - scale * share, change)
            tl.store(target + v, change * bend, mask=v < width)
        if LABEL_WEIGHTED:
            gradient = tl.where(ids == label, gradient - scale * share, gradient)
        tl.debug_barrier()  # the loop's writes are done before the support's overwrite them
        tl.store(target + ids, gradient * slope, mask=valid)
