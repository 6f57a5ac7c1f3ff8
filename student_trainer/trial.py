"""Running a model once before it trains, to see what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# A model of another shape, arguments it does not take, or kernels that do not run here.
_CANNOT_RUN = (AttributeError, TypeError, ValueError, RuntimeError)


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
        except _CANNOT_RUN:
            config._attn_implementation = "eager"
            return trial(), ""
    except _CANNOT_RUN as error:
        return False, f"{type(error).__name__}: {error}"
    finally:
        config._attn_implementation = attention
        model.train(training)
