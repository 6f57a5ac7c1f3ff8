"""The output head: the computation from the last hidden state to the logits.

The fused loss bypasses the model's own forward here, so it must know this computation:

    logits = cap·tanh(z / cap) with z = scale · hidden @ weightᵀ + bias
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from student_trainer.losses.chunks import CHUNK_BYTES
from student_trainer.losses.projection import linear, project
from student_trainer.model.probe import probe_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputHead:
    """A linear output layer, and the scale and soft-cap that the model applies to its logits.

    Attributes:
        layer: the layer itself, tied to the input embeddings or not; its weight is read at each
            use, because wrappers replace the tensor.
        scale: factor of the logits: `logit_scale` (Cohere), 1 / `logits_scaling` (Granite).
        softcap: `final_logit_softcapping` (Gemma), or None.
    """

    layer: nn.Linear
    scale: float
    softcap: float | None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the whole weight for the block, once for all chunks.

        FSDP2 has gathered a layer that is sharded together with the model. A layer that is sharded
        on its own is gathered by its own forward, which the loss bypasses. FSDP2 shards it again
        after the backward pass has reduced its gradient.
        """
        layer = self.layer
        if not isinstance(layer, FSDPModule):
            yield
            return
        layer.unshard()
        yield
        if not torch.is_grad_enabled():
            layer.reshard()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [N, V] of hidden states [N, d], at least float32 for any layer dtype.

        A bias is scaled too; no known model has both a bias and a scale.
        """
        logits = linear(hidden, self.layer.weight, self.layer.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        cap = self.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def top_ids(self, hidden: torch.Tensor, count: int, vocab_size: int) -> torch.Tensor:
        """Return the ids [N, count] of the most probable tokens below ``vocab_size``, in chunks.

        Soft-capping and a scale above 0 keep the order, so they are left out.
        """
        weight = self.layer.weight[:vocab_size]  # [V, d], a view
        bias = None if self.layer.bias is None else self.layer.bias[:vocab_size]
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # convert once, not for each chunk
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ids = hidden.new_empty((len(hidden), count), dtype=torch.int64)
        size = max(1, CHUNK_BYTES // (4 * vocab_size))
        with torch.autocast(device, enabled=False):
            for part, found in zip(hidden.split(size), ids.split(size), strict=True):
                logits = project(part, weight, bias)  # [n, V]
                found.copy_((logits if self.scale > 0.0 else -logits).topk(count, dim=-1).indices)
        return ids


@contextmanager
def float32_logits(causal_lm: Any) -> Iterator[None]:
    """Make the model's own output layer, and adapters on it, return float32 within the block.

    A layer whose weights are quantised is unchanged. The weights are read inside the layer's own
    call, because ZeRO-3 gathers them only there.
    """
    head = causal_lm.get_output_embeddings()
    linears: list[Any] = [module for module in head.modules() if type(module) is nn.Linear]
    wide = max((layer.out_features for layer in linears), default=0)
    # Only the layers that give logits: the first factor of a low-rank adapter is narrower.
    layers = [layer for layer in linears if layer.out_features == wide]
    for layer in layers:
        layer.forward = functools.partial(_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return linear(hidden, layer.weight, layer.bias)


def find_head(causal_lm: Any, forward: Any) -> OutputHead | None:
    """Return a causal language model's head; None where `OutputHead` cannot compute its logits.

    The head is built from the config and compared with the model's own logits on eight tokens. It
    is None for layers that are more than linear: adapters on the head (LoRA, whose low-rank part
    would need the full weight gradient anyway), quantised weights, or weights that ZeRO-3 has
    sharded (it gathers them only inside the layer's own forward). The loss is right without a head
    too, but then the logits of all positions exist. Call it before FSDP shards the model; see
    `OutputHead.gathered`.

    Args:
        causal_lm: not yet wrapped for distribution or compiled.
        forward: the model's original forward.
    """
    layer = causal_lm.get_output_embeddings()
    if type(layer) is not nn.Linear or hasattr(layer.weight, "ds_id"):
        kind = "sharded" if type(layer) is nn.Linear else type(layer).__name__
        logger.warning(
            "The output layer is %s, not a plain linear layer at hand: the loss uses the model's "
            "own logits of all positions, and needs memory for them",
            kind,
        )
        return None
    config = causal_lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    head = OutputHead(layer, float(scale), float(cap) if cap else None)
    known, error = probe_model(causal_lm, lambda: _reproduces_logits(head, causal_lm, forward))
    if known:
        return head
    name = type(causal_lm).__name__
    reason = f"{name} does more to its logits than is known here"
    if error:
        reason = f"what {name} does to its logits could not be tried ({error})"
    logger.warning(
        "%s: the loss uses the model's own logits of all positions, and needs memory for them",
        reason,
    )
    return None


def _reproduces_logits(head: OutputHead, causal_lm: Any, forward: Any) -> bool:
    weight = head.layer.weight
    input_ids = torch.arange(8, device=weight.device)[None] % weight.shape[0]  # [1, 8]
    hidden = causal_lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    ours = head.logits(hidden).float()
    theirs = forward(input_ids=input_ids, use_cache=False).logits.float()
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    scale = float(theirs.abs().max().clamp_min(1.0))
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= tolerance * scale
