"""The sparse divergence computed from the last hidden states, without ever holding logits [N, V].

Positions are projected a chunk at a time. The chunk's logits are overwritten by their gradient,
which is added to the gradients of hidden states and weights before the next chunk. Memory beside
the gradients is one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from student_trainer.losses.chunks import card_bytes, chunk_positions
from student_trainer.losses.deprecated import former_parameters
from student_trainer.losses.distribution import HardLabels, SparseDistribution
from student_trainer.losses.divergence import Divergence, LossOutput, SparseStatistics
from student_trainer.losses.kernels import Kernel, choose_kernel, empty_rows
from student_trainer.losses.projection import add_product, project
from student_trainer.losses.reference import compute_dtype
from student_trainer.losses.sparse import check_teacher, check_weights, with_offset


@former_parameters
def linear_sparse_jsd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: SparseDistribution,
    divergence: Divergence,
    *,
    normalizer: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    weights: torch.Tensor | None = None,
    labels: HardLabels | None = None,
    kernel: Kernel = "auto",
    add_to: torch.Tensor | None = None,
) -> LossOutput:
    """Return the summed sparse divergence over ``normalizer``, computed from hidden states.

    The student's logits are ``logit_scale · (hidden @ weightᵀ + bias)``, and the loss equals
    `sparse_generalized_jsd(...).loss.sum() / normalizer`. Gradients are computed in the forward
    pass, only for tensors that require them: a frozen output layer costs no weight gradient. Logits
    of half-precision states and weights are float32; their gradient is rounded to half precision
    before it is multiplied with states and weights.

    Args:
        hidden: [N, d] last hidden states of the positions.
        weight: [V, d] output layer, of the dtype of ``hidden`` (under autocast, any).
        teacher: distributions of N positions, scored at the divergence's temperature.
        divergence: beta, temperature and treatment of the tail.
        normalizer: divisor of the sum, such as the tokens of the whole optimizer step.
        bias: [V] or None.
        softcap: the logits z become softcap·tanh(z / softcap) (Gemma); costs a second chunk.
        logit_scale: factor of the logits, before they are capped (Cohere, Granite).
        weights, labels, kernel: see `sparse_generalized_jsd`.
        chunk_size: positions at a time; by default equal chunks of at most 256 MiB of logits, on a
            GPU of as many positions as its matmuls need; see `chunks`.
        vocab_size: number of token ids that are outcomes (padded vocabularies); the rest gets no
            probability and no gradient.
        add_to: [V, d] of the arithmetic's dtype, takes the gradient of ``weight``, which autograd
            then does not get. It is added in this forward pass, so the caller must run the backward
            pass once, with the factor 1. Memory for a second [V, d] is spared.

    Returns:
        ``loss``, a scalar of the arithmetic's dtype: float64 for float64 input, else float32;
        differentiable once with respect to ``hidden``, ``weight`` and ``bias``. ``statistics`` of
        each position [N], detached.

    Raises:
        ValueError: as in `sparse_generalized_jsd`, or shapes and dtypes do not fit.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check_shapes(hidden, weight, bias, teacher, vocab_size)
    check_teacher(teacher, vocab_size)
    check_weights(weights, labels, len(teacher), vocab_size)
    _check_add_to(add_to, hidden, weight)
    if chunk_size is None:
        trained = weight.requires_grad and torch.is_grad_enabled()
        card = card_bytes(hidden.device)
        chunk_size = chunk_positions(len(teacher), vocab_size, card, trained=trained)
    elif chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    if not normalizer > 0:
        raise ValueError(f"normalizer {normalizer} must be above 0")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap {softcap} must be above 0 and finite, or None")
    if not math.isfinite(logit_scale) or logit_scale == 0.0:
        raise ValueError(f"logit_scale {logit_scale} must be finite and not 0")
    if not torch.is_grad_enabled():  # autograd functions see a leaf's requires_grad all the same
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden is {hidden.dtype}: use one dtype")
    with torch.autocast(device, enabled=False):
        projection = _Projection(
            chunk_size, 1.0 / float(normalizer), vocab_size, softcap, float(logit_scale)
        )
        loss, *columns = _LinearSparseJSD.apply(
            hidden, weight, bias, teacher, divergence, projection, weights, labels, kernel, add_to
        )
    return LossOutput(loss, SparseStatistics(*columns))


@dataclass(frozen=True)
class _Projection:
    """The numbers by which hidden states become chunks of logits and a sum of losses.

    Attributes:
        chunk_size: positions at a time.
        scale: factor of the sum, 1 / normalizer.
        vocab_size, softcap, logit_scale: as in `linear_sparse_jsd`.
    """

    chunk_size: int
    scale: float
    vocab_size: int
    softcap: float | None
    logit_scale: float


def _check_shapes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher: SparseDistribution,
    vocab_size: int,
) -> None:
    if hidden.ndim != 2 or len(teacher) != hidden.shape[0]:
        raise ValueError(
            f"hidden must be [N, d] with N = {len(teacher)} as in the teacher, got "
            f"{list(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [V, d] with d = {hidden.shape[1]}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size {vocab_size} must be from 1 to {weight.shape[0]}")


def _check_add_to(add_to: torch.Tensor | None, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    if add_to is None:
        return
    dtype = compute_dtype(hidden)
    if add_to.shape != weight.shape or add_to.dtype != dtype or hidden.dtype == torch.float16:
        raise ValueError(
            f"add_to must be {list(weight.shape)} of {dtype}, and hidden not float16, got "
            f"{list(add_to.shape)} of {add_to.dtype} and hidden of {hidden.dtype}"
        )


class _LinearSparseJSD(torch.autograd.Function):
    """The autograd function that computes all gradients in its forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher: SparseDistribution,
        divergence: Divergence,
        projection: _Projection,
        weights: torch.Tensor | None,
        labels: HardLabels | None,
        kernel: Kernel,
        add_to: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        chunk_size, scale = projection.chunk_size, projection.scale
        vocab_size, logit_scale = projection.vocab_size, projection.logit_scale
        count, dtype = hidden.shape[0], compute_dtype(hidden)
        step = choose_kernel(kernel, hidden)
        layer = weight[:vocab_size]  # [V, d], a view
        offset = None if bias is None else bias[:vocab_size]  # [V]
        wanted = ctx.needs_input_grad[:3]
        # In float16 most gradients underflow if they are divided by the normalizer before a loss
        # scaler multiplies them, so the division waits for the backward pass.
        late = hidden.dtype == torch.float16
        early_scale, ctx.late_scale = (1.0, scale) if late else (scale, 1.0)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Chunks are summed in the arithmetic's dtype, because bfloat16 loses small summands.
        grad_weight = add_to
        if add_to is None and wanted[1]:  # the first chunk is written, so only padding is zeroed
            grad_weight = torch.empty_like(weight, dtype=dtype)
            grad_weight[vocab_size if count else 0 :].zero_()
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and wanted[2] else None
        size = (min(chunk_size, count), vocab_size)
        buffer = empty_rows(step, hidden, size, dtype)
        # The gradient in the dtype of the matmuls; of equal dtypes it takes the logits' place.
        narrow = buffer
        if dtype != hidden.dtype and (wanted[0] or wanted[1]):
            narrow = empty_rows(step, hidden, size, hidden.dtype)
        loss = hidden.new_zeros((), dtype=dtype)
        parts: list[SparseStatistics] = []
        for first in range(0, count, chunk_size):
            chunk = slice(first, min(first + chunk_size, count))
            part = hidden[chunk]  # [n, d]
            logits = project(part, layer, offset, out=buffer[: part.shape[0]])  # [n, V]
            if logit_scale != 1.0:
                logits *= logit_scale
            targets = teacher[chunk]
            counts = None if weights is None else weights[chunk]
            gradient = narrow[: part.shape[0]]  # [n, V]
            # A bias gradient sums what is not rounded, so it needs the gradient in both dtypes.
            separate = narrow is not buffer and grad_bias is None
            found = step.divergence_and_gradient(
                logits,
                targets,
                divergence,
                scale=early_scale * logit_scale,
                weights=counts,
                labels=None if labels is None else labels[chunk],
                softcap=projection.softcap,
                with_gradient=any(wanted),
                out=gradient if separate else None,
            )
            losses, statistics = with_offset(found, targets, counts)
            loss += losses.sum() * scale
            parts.append(statistics)
            if narrow is not buffer and not separate:
                gradient.copy_(logits)
            if grad_hidden is not None:
                torch.mm(gradient, layer, out=grad_hidden[chunk])
            if grad_weight is not None:
                begins = first == 0 and add_to is None
                add_product(grad_weight[:vocab_size], gradient.T, part, first=begins)
            if grad_bias is not None:
                grad_bias[:vocab_size] += logits.sum(dim=0, dtype=dtype)
        ctx.added = add_to is not None
        ctx.save_for_backward(grad_hidden, None if ctx.added else grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        columns = _concatenate(parts, hidden.device)
        ctx.mark_non_differentiable(*columns)
        return loss, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        factor = upstream * ctx.late_scale
        # Reading the factor would wait for a GPU, which scales and converts in one pass anyway.
        unscaled = not factor.is_cuda and float(factor) == 1.0
        if ctx.added and not (unscaled or factor.is_cuda):
            raise RuntimeError(f"add_to holds the gradient times 1, not times {float(factor)}")
        gradients = [
            None
            if saved is None
            else saved.to(dtype)
            if unscaled
            else _scaled(saved, factor, dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return gradient · factor in a dtype, computed in the gradient's own and rounded once."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _concatenate(parts: list[SparseStatistics], device: torch.device) -> list[torch.Tensor]:
    if not parts:
        return [torch.zeros(0, device=device) for _ in SparseStatistics.__dataclass_fields__]
    return [
        torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)
    ]
