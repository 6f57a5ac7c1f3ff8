"""Running a model once before it trains, to see what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# A model of another shape, arguments it does not take, or kernels that do not run here.
CANNOT_RUN = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)

# Largest error of logits, relative to how far they spread. A wrong state or a wrong position is off
# by tens of percent, rounding in half precision by one or two.
TOLERANCE, HALF_TOLERANCE = 1e-2, 1e-1


@torch.no_grad()
def passes(model: Any, trial: Callable[[], bool]) -> tuple[bool, str]:
    """Whether a trial of the model succeeds, and the error where it cannot be run.

    In evaluation mode. A trial that fails is repeated with eager attention, because flash attention
    runs on a GPU and in half precision alone, and a model that FSDP will shard is still on the CPU.
    So a trial can tell of everything but the attention's kernel.
    """
    config = model.config.get_text_config()
    training, attention = model.training, config._attn_implementation
    model.eval()
    try:
        try:
            return trial(), ""
        except CANNOT_RUN:
            config._attn_implementation = "eager"
            return trial(), ""
    except CANNOT_RUN as error:
        return False, f"{type(error).__name__}: {error}"
    finally:
        config._attn_implementation = attention
        model.train(training)


def same_logits(found: torch.Tensor, expected: torch.Tensor, *, half: bool) -> bool:
    """Return whether logits [n, V] agree but for rounding, which is coarser where ``half``.

    Columns that are not finite (tokens that the model never gives) are left out.
    """
    found, expected = found.float(), expected.float()
    finite = expected.isfinite().all(dim=0) & found.isfinite().all(dim=0)  # [V]
    if not finite.any():
        return True
    found, expected = found[:, finite], expected[:, finite]
    spread = (expected - expected.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    error = (found - expected).square().mean().sqrt()
    return bool(error <= (HALF_TOLERANCE if half else TOLERANCE) * spread)
