"""The student's forward pass, ended in the loss instead of the logits."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from student_trainer.losses import (
    SparseDistribution,
    SparseStatistics,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseTargets:
    """What a micro-batch is compared with.

    Attributes:
        rows: [N] int64, flat index ``b·L + position`` of the hidden state that predicts each
            learned token.
        teacher: the distributions, N rows.
        beta, temperature: of the divergence.
        normalizer: learned tokens of the whole optimizer step, over ranks and micro-batches.
        vocab_size: the shared vocabulary; student logits from here on are left out.
    """

    rows: torch.Tensor
    teacher: SparseDistribution
    beta: float
    temperature: float
    normalizer: float
    vocab_size: int

    def to(self, device: torch.device) -> SparseTargets:
        return replace(self, rows=self.rows.to(device), teacher=self.teacher.to(device))


def install_sparse_loss(model: Any) -> None:
    """Give ``model.forward`` a ``sparse_targets`` argument, with which it returns the loss.

    The loss must be computed inside ``forward``: distributed wrappers (DDP, FSDP, autocast) do
    their work around it. With ``sparse_targets`` it returns ``{"loss": scalar, "statistics":
    SparseStatistics}``, and the logits of all positions never exist; without, it is unchanged.

    Args:
        model: a causal language model of transformers, or a peft model around one.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = causal_lm.forward
    linear = _has_linear_head(causal_lm, original)

    @functools.wraps(original)
    def forward(*args: Any, sparse_targets: SparseTargets | None = None, **kwargs: Any) -> Any:
        if sparse_targets is None:
            return original(*args, **kwargs)
        if args:
            raise TypeError("pass input_ids and attention_mask by name")
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask")}
        if linear:
            decoder = causal_lm.get_decoder()
            hidden = decoder(**inputs, use_cache=False).last_hidden_state  # [B, L, d]
            return _loss_of_hidden(causal_lm, hidden.flatten(0, 1), sparse_targets)
        logits = original(**inputs, use_cache=False).logits  # [B, L, V]
        return _loss_of_logits(logits.flatten(0, 1), sparse_targets)

    causal_lm.forward = forward


def _loss_of_hidden(
    causal_lm: Any, hidden: torch.Tensor, targets: SparseTargets
) -> dict[str, torch.Tensor | SparseStatistics]:
    head = causal_lm.get_output_embeddings()
    loss, statistics = linear_sparse_jsd(
        hidden[targets.rows] * _head_scale(causal_lm.config),  # [N, d]
        head.weight,
        targets.teacher,
        bias=head.bias,
        beta=targets.beta,
        temperature=targets.temperature,
        normalizer=targets.normalizer,
        vocab_size=targets.vocab_size,
        return_statistics=True,
    )
    return {"loss": loss, "statistics": statistics}


def _loss_of_logits(
    logits: torch.Tensor, targets: SparseTargets
) -> dict[str, torch.Tensor | SparseStatistics]:
    divergence, statistics = sparse_generalized_jsd(
        logits[targets.rows][:, : targets.vocab_size],  # [N, V]
        targets.teacher,
        beta=targets.beta,
        temperature=targets.temperature,
        return_statistics=True,
    )
    return {"loss": divergence.sum() / targets.normalizer, "statistics": statistics}


def _head_scale(config: Any) -> float:
    """Factor between hidden @ weight and the logits (Cohere multiplies, Granite divides)."""
    scale: float = getattr(config, "logit_scale", None) or 1.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def _has_linear_head(causal_lm: Any, forward: Any) -> bool:
    """Whether the logits are a plain linear function of the last hidden state.

    Told by trying: four tokens through both ways. Where they differ (soft-capping, adapters on the
    head), or the weights are not all here (ZeRO-3), the model computes its own logits.
    """
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear or hasattr(head.weight, "ds_id"):
        logger.warning("The output layer is not a plain linear layer: using the model's own logits")
        return False
    training = causal_lm.training
    causal_lm.eval()
    input_ids = torch.arange(4, device=head.weight.device)[None]
    hidden = causal_lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    ours = nn.functional.linear(hidden * _head_scale(causal_lm.config), head.weight, head.bias)
    theirs = forward(input_ids=input_ids, use_cache=False).logits
    causal_lm.train(training)
    tolerance = 1e-4 if theirs.dtype == torch.float32 else 3e-2
    scale = float(theirs.float().abs().max().clamp_min(1.0))
    same = float((ours.float() - theirs.float()).abs().max()) <= tolerance * scale
    if not same:
        logger.warning("The output layer is more than linear: using the model's own logits")
    return same
