"""Gradients of the output layer and the embedding that are added in place.

Autograd makes a new [V, d] for each use of such a weight and adds them up. With tied weights a
micro-batch would hold three of them: the sum of earlier micro-batches, the output layer's gradient,
and the embedding's, in which all rows are zero but those of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from student_trainer.runtime.compat import has_gradient_hooks


def gradient_of(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the ``.grad`` of a weight, zeros if it had none; None if it cannot be added to.

    It can where the weight is a trained float32 parameter without hooks, because nothing else then
    sees the gradient before the optimizer.
    """
    addable = (
        isinstance(weight, nn.Parameter)
        and weight.is_leaf
        and weight.requires_grad
        and weight.layout == torch.strided
        and weight.dtype == torch.float32
        and not has_gradient_hooks(weight)
    )
    if not addable or not torch.is_grad_enabled():
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextmanager
def rows_added_in_place(embedding: Any) -> Iterator[None]:
    """Let an embedding that is called in the block give the gradient of the rows it read alone.

    Autograd adds such a sparse gradient to a dense ``.grad`` in place.
    """
    plain = isinstance(embedding, nn.Embedding) and not embedding.scale_grad_by_freq
    if not plain or embedding.sparse or gradient_of(embedding.weight) is None:
        yield
        return
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False
