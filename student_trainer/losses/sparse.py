"""The divergence of given logits against a sparse teacher.

The mathematics is in `closed_form`; it is applied here to whole logits, in `fused` to chunks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from student_trainer.losses.deprecated import former_parameters
from student_trainer.losses.distribution import HardLabels, SparseDistribution
from student_trainer.losses.divergence import Divergence, LossOutput, SparseStatistics
from student_trainer.losses.kernels import Kernel, choose_kernel, empty_rows


@former_parameters
def sparse_generalized_jsd(
    student_logits: torch.Tensor,
    teacher: SparseDistribution,
    divergence: Divergence,
    *,
    weights: torch.Tensor | None = None,
    labels: HardLabels | None = None,
    kernel: Kernel = "auto",
) -> LossOutput:
    """Return the generalized JSD between a sparse teacher and the student's full logits.

    Over support and tail it never exceeds the dense divergence (coarse-graining lowers an
    f-divergence), and equals it when the support is the whole vocabulary.

    Args:
        student_logits: [N, V], any floating dtype; the arithmetic is float32 at least.
        teacher: distributions of N positions, scored at the divergence's temperature.
        divergence: beta, temperature and treatment of the tail.
        weights: [N] weight of each position's divergence; None for 1.
        labels: adds their weighted cross-entropy −log softmax(z / T) at each position's label.
        kernel: implementation; "auto" takes Triton on a GPU.

    Returns:
        ``loss`` [N], nats: weight · divergence + label weight · cross-entropy; differentiable once
        with respect to ``student_logits``. ``statistics`` of each position, detached.

    Raises:
        ValueError: shapes that do not fit, an id outside the vocabulary or twice in a row, or a
            teacher log-prob or a weight that is NaN or infinite.

    Source: GKD, arXiv 2306.13649, over the coarse-grained outcomes.
    """
    if student_logits.ndim != 2 or len(teacher) != student_logits.shape[0]:
        raise ValueError(
            f"student_logits must be [N, V] with N = {len(teacher)} as in the teacher, got "
            f"{list(student_logits.shape)}"
        )
    check_teacher(teacher, student_logits.shape[1])
    check_weights(weights, labels, len(teacher), student_logits.shape[1])
    loss, *columns = _SparseJSD.apply(student_logits, teacher, divergence, weights, labels, kernel)
    return LossOutput(loss, SparseStatistics(*columns))


def with_offset(
    found: LossOutput, teacher: SparseDistribution, weights: torch.Tensor | None
) -> LossOutput:
    """Return loss [N] and statistics with the teacher's offset added, if it has one.

    A teacher estimated from draws has one. Statistics that draws cannot estimate become NaN, and
    the gap bound +inf.
    """
    if teacher.offset is None:
        return found
    loss, statistics = found
    offset = teacher.offset.to(loss.dtype)
    unknown = torch.full_like(statistics.divergence, math.nan)
    return LossOutput(
        loss + (offset if weights is None else offset * weights),
        replace(
            statistics,
            divergence=statistics.divergence + teacher.offset.float(),
            teacher_support_mass=unknown,
            teacher_entropy=unknown,
            top1_agreement=unknown,
            gap_bound=torch.full_like(unknown, math.inf),
        ),
    )


def check_teacher(teacher: SparseDistribution, vocab_size: int) -> None:
    """Check the teacher's ids and log-probs; waits for the device once.

    Raises:
        ValueError: an id outside the vocabulary or twice at a position, or a log-prob that is NaN
            or +inf.
    """
    ids = teacher.token_ids
    named = torch.where(ids >= 0, teacher.logprobs, 0.0)
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)  # [N, K − 1]
    unusable = [
        ((ids >= vocab_size) | (ids < -1)).any(),
        (named.isnan() | named.isposinf()).any(),
        (teacher.tail_logprob.isnan() | teacher.tail_logprob.isposinf()).any(),
        repeated.any(),
    ]
    outside, bad_logprob, bad_tail, twice = torch.stack(unusable).tolist()
    if outside:
        worst = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise ValueError(
            f"teacher.token_ids holds {worst}; ids must be below the vocabulary of {vocab_size}, "
            "or −1 for padding. Move the mass of others to the tail"
        )
    if bad_logprob or bad_tail:
        name = "logprobs" if bad_logprob else "tail_logprob"
        raise ValueError(f"teacher.{name} holds NaN or +inf; check the teacher's answer")
    if twice:
        n, place = (int(at[0]) for at in torch.where(repeated))
        raise ValueError(
            f"teacher.token_ids names {int(ordered[n, place])} twice in row {n}; name each id "
            "once and fill up with −1"
        )


def check_weights(
    weights: torch.Tensor | None, labels: HardLabels | None, count: int, vocab_size: int
) -> None:
    """Check weights and labels; waits for the device once.

    Raises:
        ValueError: wrong shapes, NaN or infinities, or a label outside the vocabulary.
    """
    if weights is not None and weights.shape != (count,):
        raise ValueError(f"weights must be [N] = [{count}], got {list(weights.shape)}")
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels must be [N] = [{count}], got [{len(labels)}]")
    label_weights = None if labels is None else labels.weights
    given = {"weights": weights, "label weights": label_weights}
    flags = {
        f"{name} hold NaN or an infinity": (~values.isfinite()).any()
        for name, values in given.items()
        if values is not None
    }
    if labels is not None:
        outside = (labels.token_ids < 0) | (labels.token_ids >= vocab_size)
        flags["labels"] = outside.any()
    if not flags:
        return
    wrong = [
        name
        for name, bad in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True)
        if bad
    ]
    if wrong == ["labels"] and labels is not None:
        worst = int(labels.token_ids[outside][0])
        raise ValueError(
            f"labels hold {worst}; ids must be from 0 and below the vocabulary of {vocab_size}"
        )
    if wrong:
        raise ValueError(wrong[0])


class _SparseJSD(torch.autograd.Function):
    """The autograd function that writes the gradient in its forward pass, over a copy of logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: torch.Tensor,
        teacher: SparseDistribution,
        divergence: Divergence,
        weights: torch.Tensor | None,
        labels: HardLabels | None,
        kernel: Kernel,
    ) -> tuple[torch.Tensor, ...]:
        step = choose_kernel(kernel, student_logits)
        dtype = step.logits_dtype(student_logits.dtype)
        count, vocab_size = student_logits.shape
        logits = empty_rows(step, student_logits, (count, vocab_size), dtype)
        logits.copy_(student_logits)
        with_gradient = ctx.needs_input_grad[0]
        found = step.divergence_and_gradient(
            logits,
            teacher,
            divergence,
            weights=weights,
            labels=labels,
            with_gradient=with_gradient,
        )
        loss, statistics = with_offset(found, teacher, weights)
        if with_gradient:
            ctx.save_for_backward(logits)
            ctx.dtype = student_logits.dtype
        ctx.mark_non_differentiable(*vars(statistics).values())
        return loss, *vars(statistics).values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(ctx.dtype), None, None, None, None, None
