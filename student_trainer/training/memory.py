"""An estimate of the memory of a step, from the configuration alone: no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from student_trainer.config.arguments import (
    AdapterArguments,
    ModelArguments,
    uses_deepspeed,
    uses_fsdp,
)
from student_trainer.config.training_arguments import CommonTrainingArguments
from student_trainer.losses.chunks import MOST_POSITIONS, card_bytes, chunk_bytes
from student_trainer.model.load import load_skeleton

# NF4 with double quantisation (QLoRA, arXiv 2305.14314): 4 bits, an 8-bit scale for each 64 weights
# and a 32-bit one for each 256 of those.
_BYTES_OF_4_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Memory:
    """The bytes of one process without sharding; activations, caches and kernels come on top.

    Attributes:
        parameters, trainable: counts, not bytes.
        weights, gradients: of all parameters; of those that are trained.
        buckets: in which DDP exchanges gradients between processes: a second copy of them.
        optimizer: its state after the first step; None where that is not known without a GPU.
        casts: copies of linear layers' weights that --bf16 or --fp16 computes with, at most.
        loss: a chunk of logits and its gradient in half precision, and the gradient of an output
            layer that is trained and whose gradient is not added in place.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    buckets: int
    optimizer: int | None
    casts: int
    loss: int

    @property
    def total(self) -> int:
        step = self.gradients + self.buckets + (self.optimizer or 0)
        return self.weights + step + self.casts + self.loss


def estimate_memory(
    model: ModelArguments,
    adapters: AdapterArguments,
    args: CommonTrainingArguments,
    *,
    tokens: int,
    card: int | None = None,
) -> Memory:
    """Return the memory of a training step.

    It is exact for weights, gradients and optimizer, unless weights are quantised.

    Args:
        tokens: learned in a micro-batch, at most.
        card: bytes of the GPU's memory; None for this machine's own, if it has one.

    Raises:
        ConfigurationError: there is no such model, or the adapters do not fit it.
    """
    skeleton = load_skeleton(
        model, adapters, gradient_checkpointing=bool(args.gradient_checkpointing)
    )
    parameters = list(skeleton.parameters())
    trained = [p for p in parameters if p.requires_grad]
    head = skeleton.get_output_embeddings().weight
    linear = [m.weight for m in skeleton.modules() if isinstance(m, nn.Linear)]
    weights = bytes_of(parameters)
    if adapters.load_in_4bit:
        whole = [w for w in linear if not w.requires_grad and w is not head]
        weights += round(_BYTES_OF_4_BIT * sum(w.numel() for w in whole)) - bytes_of(whole)
    casts = 0
    if args.bf16 or args.fp16:
        casts = sum(2 * w.numel() for w in linear if w.dtype == torch.float32)
    if adapters.load_in_4bit:
        casts = 0  # a 4-bit layer is unpacked when it is used, and no copy stays
    if card is None and torch.cuda.is_available():
        card = card_bytes(torch.device("cuda"))
    sharded = uses_fsdp(args) or uses_deepspeed(args)
    return Memory(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trained),
        weights=weights,
        gradients=bytes_of(trained),
        buckets=bytes_of(trained) if args.world_size > 1 and not sharded else 0,
        optimizer=_optimizer_bytes(args, skeleton, trained),
        casts=casts,
        loss=_chunk_bytes(head, tokens, card, half=args.bf16 or args.fp16)
        + (0 if _adds_in_place(args, head, sharded) else 4 * head.numel() * head.requires_grad),
    )


def _chunk_bytes(head: torch.Tensor, tokens: int, card: int | None, *, half: bool) -> int:
    """Return the bytes of a chunk of logits and of its gradient in half precision."""
    if card is not None:
        tokens = min(tokens, MOST_POSITIONS)
    chunk = min(chunk_bytes(card, trained=head.requires_grad), 4 * len(head) * tokens)
    narrow = chunk // 2 if half or head.element_size() == 2 else 0
    return chunk + narrow


def _adds_in_place(args: CommonTrainingArguments, head: torch.Tensor, sharded: bool) -> bool:
    """Return whether the gradient of the output layer needs no second matrix: see `in_place`."""
    alone = args.world_size == 1 and args.n_gpu <= 1 and not sharded
    return alone and head.dtype == torch.float32 and not (args.fp16 or args.torch_compile)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_bytes(
    args: CommonTrainingArguments, model: Any, trained: list[nn.Parameter]
) -> int | None:
    """Return the bytes of the optimizer's state, from a step on the meta device; None if it fails.

    Tensors on the meta device have shapes and no memory.
    """
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        options.pop("fused", None)  # the fused kernel needs a device, and has the same state
        optimizer = kind(trained, **options)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    except Exception:  # libraries raise anything about a missing GPU or tensors without numbers
        return None
    states = (value for state in optimizer.state.values() for value in state.values())
    return bytes_of(value for value in states if isinstance(value, torch.Tensor))
