"""The decision to pack sequences end to end instead of padding them.

transformers recognises packed sequences by position ids that restart at 0, and keeps them apart if
the model's attention supports it. Flash attention then computes no padding; other kernels use a
mask over the whole input, quadratic in its length.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch

from shared.errors import ConfigurationError
from shared.rope import length_dependent_rope
from student_trainer.data.collate import model_inputs
from student_trainer.data.sample import Sample
from student_trainer.model.probe import probe_model
from student_trainer.runtime.compat import is_flash_attention_requested

logger = logging.getLogger(__name__)

Packing = Literal["auto", "on", "off"]


def decide_packing(model: Any, packing: Packing, longest: int | None = None) -> bool:
    """Return whether micro-batches are packed; ``auto`` packs for flash attention.

    Args:
        model: causal language model, or a peft model around one; not yet wrapped for distribution.
        longest: tokens of the longest possible sequence; None if that is not known.

    Raises:
        ConfigurationError: ``on``, and packed sequences do not get the logits of padded ones.
    """
    if packing == "off" or (packing == "auto" and not is_flash_attention_requested(model.config)):
        return False
    apart, error = probe_model(model, lambda: _keeps_packed_sequences_apart(model, longest))
    if apart:
        return True
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    reason = f"{name} does not give packed sequences the logits of padded ones"
    if error:
        reason = f"{name} could not be tried with packed sequences ({error})"
    if packing == "on":
        raise ConfigurationError(f"--packing on: {reason}; use off")
    logger.warning("%s: padding", reason)
    return False


def _keeps_packed_sequences_apart(model: Any, longest: int | None) -> bool:
    """Return whether three short sequences get the same logits packed and padded.

    They do not with state-space and convolutional layers, positions counted from the attention
    mask, and ALiBi. Attention in chunks of positions (Llama 4) counts along the packed input, which
    no short sequence would show, so the config decides. The config also decides where the longest
    sequence changes the rope frequencies of all others.
    """
    config = model.config.get_text_config()
    if getattr(config, "attention_chunk_size", None):
        return False
    rope = length_dependent_rope(config)
    if rope is not None and (longest is None or longest > rope.original):
        return False
    device = next(model.parameters()).device
    lengths = [9, 14, 5]
    ids = (7 * np.arange(sum(lengths), dtype=np.uint32) + 3) % config.vocab_size
    samples = [
        Sample(part, 1, np.ones(len(part) - 1, bool), "dataset")
        for part in np.split(ids, np.cumsum(lengths)[:-1])
    ]
    padded, packed = (
        model(
            **{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False
        ).logits
        for inputs in (model_inputs(samples, 0, packed=packed) for packed in (False, True))
    )
    expected = torch.cat([one[:length] for one, length in zip(padded, lengths, strict=True)])
    found = packed[0]  # [28, V]
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 3e-2
    scale = float(expected.abs().max().clamp_min(1.0))
    return float((found - expected).abs().max()) <= tolerance * scale
