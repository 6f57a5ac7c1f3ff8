"""The probing of a model before training: small forward passes that show its abilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from student_trainer.runtime.compat import attention_of, set_attention

# Errors of models with other attributes or arguments, and of kernels that do not run here.
PROBE_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)

# Largest relative error of the head's inputs that is rounding. Wrong states or positions differ by
# tens of percent, half-precision rounding by one to five. Logits would show less, because a large
# part that most tokens share is rounded coarsely.
TOLERANCE, HALF_TOLERANCE = 1e-2, 2e-1


@torch.no_grad()
def probe_model(model: Any, trial: Callable[[], bool]) -> tuple[bool, str]:
    """Run ``trial`` with the model in evaluation mode; return its result or its error.

    A trial that raises is repeated with eager attention, because flash attention runs only on a GPU
    and in half precision, and a model that FSDP will shard is still on the CPU. So a trial can test
    everything but the attention kernel.

    Returns:
        (result, ""), or (False, the error) if both attempts raised.
    """
    config = model.config.get_text_config()
    training, attention = model.training, attention_of(config)
    model.eval()
    try:
        try:
            return trial(), ""
        except torch.OutOfMemoryError:
            raise
        except PROBE_ERRORS:
            set_attention(config, "eager")
            return trial(), ""
    except torch.OutOfMemoryError:
        raise
    except PROBE_ERRORS as error:
        return False, f"{type(error).__name__}: {error}"
    finally:
        set_attention(config, attention)
        model.train(training)


# `teacher_server.backends.probe` has this too, because `shared` imports no torch.
def same_states(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether states [n, d] differ by no more than rounding in the coarser of their dtypes.

    Columns that are not finite are left out.
    """
    wide = {found.dtype, expected.dtype} <= {torch.float32, torch.float64}
    found, expected = found.float(), expected.float()
    finite = expected.isfinite().all(dim=0) & found.isfinite().all(dim=0)  # [d]
    found, expected = found[:, finite], expected[:, finite]
    tolerance = TOLERANCE if wide else HALF_TOLERANCE
    return bool((found - expected).norm() <= tolerance * expected.norm())


@contextmanager
def record_head_inputs(causal_lm: Any) -> Iterator[list[torch.Tensor]]:
    """Record the inputs of the output layer within the block, [B, L, d] each.

    They are in the dtype that the layer computes in, which under autocast may be coarser.
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
