"""Running a model once before it trains, to see what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A model of another shape, arguments it does not take, or kernels that do not run here.
PROBE_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)

# Largest error of what meets the head, relative to its size. A wrong state or position is off
# by tens of percent, rounding in half precision by one to five. Logits would tell less: what most
# of the tokens share in them is rounded much more coarsely.
TOLERANCE, HALF_TOLERANCE = 1e-2, 2e-1


@torch.no_grad()
def probe_model(model: Any, trial: Callable[[], bool]) -> tuple[bool, str]:
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
        except torch.OutOfMemoryError:
            raise
        except PROBE_ERRORS:
            config._attn_implementation = "eager"
            return trial(), ""
    except torch.OutOfMemoryError:
        raise
    except PROBE_ERRORS as error:
        return False, f"{type(error).__name__}: {error}"
    finally:
        config._attn_implementation = attention
        model.train(training)


def same_states(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether states [n, d] agree but for rounding, by the coarser dtype of the two.

    Columns that are not finite tell nothing and are left out.
    """
    wide = {found.dtype, expected.dtype} <= {torch.float32, torch.float64}
    found, expected = found.float(), expected.float()
    finite = expected.isfinite().all(dim=0) & found.isfinite().all(dim=0)  # [d]
    found, expected = found[:, finite], expected[:, finite]
    tolerance = TOLERANCE if wide else HALF_TOLERANCE
    return bool((found - expected).norm() <= tolerance * expected.norm())


@contextmanager
def record_head_inputs(causal_lm: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of the output layer, [B, L, d] each, in the dtype that it computes in.

    Under autocast that is coarser than the dtype of what it is given.
    """
    seen: list[torch.Tensor] = []

    def keep(_: Any, args: Any, output: torch.Tensor) -> None:
        dtype = min((args[0].dtype, output.dtype), key=lambda dtype: dtype.itemsize)
        seen.append(args[0].to(dtype))

    hook = causal_lm.get_output_embeddings().register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
