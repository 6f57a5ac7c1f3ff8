"""The projection of half-precision hidden states to float32 logits.

Matrix products sum in float32 in any case. Rounding the sum to the 8 bits of bfloat16 moves a logit
of 20 by up to .06; the nearer the student is to its teacher, the larger is the part of their
difference, and of the gradient, that is rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from student_trainer.losses.reference import compute_dtype

# Size of the float32 copies of weights where no matrix product multiplies half precision directly.
BLOCK_BYTES = 8 << 20
# Size of a product that is made at once; it stays in a GPU's cache (40 MB and more) until added.
CACHED_BYTES = 16 << 20


# `teacher_server.backends.projection` has this too, because `shared` imports no torch.
def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write a [n, d] @ b [d, m], of one dtype, into ``out`` [n, m] of the arithmetic's dtype.

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


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """Add a [m, n] @ b [n, d], of one dtype, to ``total`` [m, d] of the arithmetic's dtype.

    If it is the first product, ``total`` is written, whatever it held. On CUDA nothing is rounded
    on the way, and no second [m, d] is made; elsewhere products of half precision are rounded to it
    before they are added.
    """
    if a.dtype == total.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif not a.is_cuda:  # some rows at a time: an addition of two dtypes copies the whole product
        for some, target in zip(*_some_rows(total, a), strict=True):
            product = torch.mm(some, b)
            if first:
                target.copy_(product)
            else:
                target.add_(product)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif adds_wide_products(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # some rows at a time, whose product does not leave the GPU's cache
        for some, target in zip(*_some_rows(total, a), strict=True):
            target.add_(torch.mm(some, b, out_dtype=total.dtype))


def _some_rows(
    total: torch.Tensor, a: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return a [m, n] and ``total`` [m, d] in parts of as many rows as `CACHED_BYTES` hold."""
    rows = max(1, CACHED_BYTES // (total.element_size() * max(1, total.shape[1])))
    return a.split(rows), total.split(rows)


@functools.cache
def adds_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch adds a product of half precision to a float32 matrix in place.

    Earlier releases demand one dtype of all three. It waits for the device once in a process.
    """
    total = torch.ones(16, 16, device=device)
    one = torch.eye(16, device=device, dtype=dtype)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 1.0 + one.float()).all())


def project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return logits [n, V] = hidden [n, d] @ weightᵀ [d, V] + bias [V]; not differentiable.

    They are float64 for float64 input, else float32. ``hidden`` and ``weight`` have one dtype.
    """
    if out is None:
        size = (hidden.shape[0], weight.shape[0])
        out = hidden.new_empty(size, dtype=compute_dtype(hidden))
    matmul(hidden, weight.T, out)
    if bias is not None:
        out += bias
    return out


# torch.compile would replace the conversions between dtypes by its own.
@torch.compiler.disable
def linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `torch.nn.functional.linear` [..., V] in the arithmetic's dtype; differentiable.

    Under autocast the factors are rounded to its dtype, as the layer itself rounds them, and the
    logits are not. In the backward pass the gradient is rounded to the factors' dtype.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        flat = hidden.flatten(0, -2).to(dtype)  # [n, d]
        offset = None if bias is None else bias.to(dtype)
        logits = _Linear.apply(flat, weight.to(dtype), offset)
    return logits.unflatten(0, hidden.shape[:-1])


class _Linear(torch.autograd.Function):
    """The autograd function of `linear` for two-dimensional hidden states."""

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
