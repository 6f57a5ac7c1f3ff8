"""The output layer of half-precision models, with logits in float32.

Hidden states and weights keep the model's dtype; the sum of their products is float32. Rounding a
logit of 20 to the 8 bits of bfloat16 would move it by up to .06, and with it every log-prob of the
answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Bytes of weights in float32 at a time, where matrix products cannot turn half precision into
# float32.
BLOCK_BYTES = 8 << 20
HALF = (torch.bfloat16, torch.float16)


# `student_trainer.losses.projection` has this too, because `shared` imports no torch.
def linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return logits [..., V] of hidden states [..., d] and weight [V, d], in float32.

    Only CUDA multiplies half precision into float32. Elsewhere the weights are converted a block of
    rows at a time, which is exact. Not differentiable.
    """
    if weight.dtype not in HALF or hidden.dtype != weight.dtype:
        return nn.functional.linear(hidden, weight, bias)
    flat = hidden.flatten(0, -2)  # [n, d]
    if hidden.is_cuda:
        logits = torch.mm(flat, weight.T, out_dtype=torch.float32)
    else:
        logits = flat.new_empty((len(flat), len(weight)), dtype=torch.float32)
        flat = flat.float()
        rows = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
        for some, out in zip(weight.split(rows), logits.split(rows, dim=1), strict=True):
            torch.mm(flat, some.float().T, out=out)
    if bias is not None:
        logits += bias
    return logits.unflatten(0, hidden.shape[:-1])


def keep_float32_logits(model: Any) -> None:
    """Make a transformers model's output layer compute `linear`, if it is a plain linear one.

    Then all of the model's logits are float32, also in its own forward and in `generate`.
    """
    layer: Any = model.get_output_embeddings()
    plain = type(layer) is nn.Linear
    if plain:
        layer.forward = lambda hidden: linear(hidden, layer.weight, layer.bias)
