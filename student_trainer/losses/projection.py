"""Logits of half-precision models, kept in float32.

A sum of products is taken in float32 in any case; to round it to the 8 bits of bfloat16 moves a
logit of 20 by up to .06. The nearer the student comes to its teacher, the more of the difference
between them, and of the gradient, is then rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from student_trainer.losses.reference import compute_dtype

# Weights in float32 at once, where no matrix product takes half precision to float32.
BLOCK_BYTES = 8 << 20


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a [n, d] @ b [d, m] of one dtype, written into ``out`` [n, m] of the arithmetic's dtype.

    Only CUDA multiplies half precision into float32. Elsewhere ``b`` is converted a few columns at
    a time, which is exact: a product of two such numbers fits float32.
    """
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    wide = a.to(out.dtype)
    columns = max(1, BLOCK_BYTES // (out.element_size() * max(1, b.shape[0])))
    for some, target in zip(b.split(columns, dim=1), out.split(columns, dim=1), strict=True):
        torch.mm(wide, some.to(out.dtype), out=target)
    return out


def project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden [n, d] @ weightᵀ [d, V] + bias [V]: logits [n, V], float64 of float64, else float32.

    The caller has brought ``hidden`` and ``weight`` to one dtype. Not differentiable.
    """
    if out is None:
        size = (hidden.shape[0], weight.shape[0])
        out = hidden.new_empty(size, dtype=compute_dtype(hidden))
    matmul(hidden, weight.T, out)
    if bias is not None:
        out += bias
    return out


# A compiler would trade the conversions for its own.
@torch.compiler.disable
def linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` [..., V] that answers in the arithmetic's dtype.

    Under autocast the factors are rounded to its dtype, as they would be by the layer itself, and
    the logits are not. Differentiable; the gradient meets the factors in their own dtype.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        flat = hidden.flatten(0, -2).to(dtype)  # [n, d]
        offset = None if bias is None else bias.to(dtype)
        logits = _Linear.apply(flat, weight.to(dtype), offset)
    return logits.unflatten(0, hidden.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return project(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        narrow = gradient.to(hidden.dtype)  # [n, V]
        return (
            torch.mm(narrow, weight) if wanted[0] else None,
            torch.mm(narrow.T, hidden) if wanted[1] else None,
            gradient.sum(dim=0).to(hidden.dtype) if wanted[2] else None,
        )
