"""The student's forward pass, ended in the loss instead of the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from shared.errors import ConfigurationError
from shared.rope import LengthDependentRope, length_dependent_rope
from student_trainer.losses import (
    HardLabels,
    Kernel,
    SparseDistribution,
    SparseStatistics,
    Tail,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from student_trainer.model.head import OutputHead, find_head, float32_logits
from student_trainer.model.probe import probe_model, record_head_inputs, same_states

_INPUTS = ("input_ids", "attention_mask", "position_ids")  # a packed row has no mask


@dataclass(frozen=True)
class SparseTargets:
    """What a micro-batch is compared with.

    Attributes:
        rows: [N] int64, flat index of the hidden state that predicts each learned token:
            ``b·L + position`` where sequences are padded.
        teacher: the distributions, N rows.
        beta, temperature: of the divergence.
        normalizer: learned tokens of the whole optimizer step, over ranks and micro-batches.
        vocab_size: the shared vocabulary; student logits from here on are left out.
        tail: what becomes of the mass off the support.
        weights: [N] what each divergence counts; None for 1.
        labels: the tokens that really came next, and what their cross-entropy counts.
        kernel: who computes the loss.
    """

    positions: torch.Tensor
    teacher: SparseDistribution
    beta: float
    temperature: float
    normalizer: float
    vocab_size: int
    tail: Tail = "bucket"
    weights: torch.Tensor | None = None
    labels: HardLabels | None = None
    kernel: Kernel = "auto"

    def to(self, device: torch.device) -> SparseTargets:
        return replace(
            self,
            positions=self.positions.to(device),
            teacher=self.teacher.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )


@dataclass(frozen=True)
class TopTokens:
    """The student's own most probable tokens are asked for.

    Attributes:
        rows: [N] int64, flat index of hidden states, as in `SparseTargets`.
        count: ids for each row.
        vocab_size: only ids below it.
    """

    positions: torch.Tensor
    count: int
    vocab_size: int


@dataclass(frozen=True)
class PositionLogits:
    """The logits of a few rows are asked for.

    Attributes:
        rows: [N] int64, flat index of hidden states, as in `SparseTargets`.
        vocab_size: only of ids below it.
    """

    positions: torch.Tensor
    vocab_size: int


def install_sparse_loss(model: Any) -> None:
    """Give ``model.forward`` the arguments ``sparse_targets``, ``top_tokens`` and ``row_logits``.

    All must be computed inside ``forward``: distributed wrappers (DDP, FSDP, autocast) do their
    work around it. With ``sparse_targets`` it returns ``{"loss": scalar, "statistics":
    SparseStatistics}``, with ``top_tokens`` ``{"token_ids": [N, count]}``, with ``row_logits``
    ``{"logits": [N, vocab_size]}``; the logits of all positions never exist. Without, it is
    unchanged.

    Args:
        model: a causal language model of transformers, or a peft model around one.

    Raises:
        ConfigurationError: it is an encoder: a later token changes what it says of earlier ones.
    """
    causal_lm = _causal_lm(model)
    original = causal_lm.forward
    causal, error = probe_model(causal_lm, lambda: _is_causal(causal_lm, original))
    if not causal and not error:
        kind = causal_lm.config.get_text_config().model_type
        raise ConfigurationError(
            f"{type(causal_lm).__name__}: a later token changes the logits of earlier ones, so "
            f"this {kind} model is an encoder; give a causal one (is_decoder in its config)"
        )
    head = find_head(causal_lm, original)
    rope = length_dependent_rope(causal_lm.config)

    def compute(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states [B, L, d], or logits [B, L, V] where only the model knows them."""
        if head is not None:
            states: torch.Tensor = causal_lm.get_decoder()(
                **inputs, use_cache=False
            ).last_hidden_state
            return states
        with float32_logits(causal_lm):
            logits: torch.Tensor = original(**inputs, use_cache=False).logits
            return logits

    @functools.wraps(original)
    def forward(
        *args: Any,
        sparse_targets: SparseTargets | None = None,
        top_tokens: TopTokens | None = None,
        position_logits: PositionLogits | None = None,
        **kwargs: Any,
    ) -> Any:
        wanted = sparse_targets or top_tokens or position_logits
        if wanted is None:
            return original(*args, **kwargs)
        if args:
            raise TypeError("pass input_ids and attention_mask or position_ids by name")
        inputs = {name: kwargs[name] for name in _INPUTS if name in kwargs}
        states = compute(inputs) if rope is None else _compute_by_regime(compute, inputs, rope)
        states = states.flatten(0, 1)[wanted.positions]  # [N, V] or [N, d]
        if isinstance(wanted, TopTokens):
            return {"token_ids": _top_ids(head, states, wanted)}
        if isinstance(wanted, PositionLogits):
            return {"logits": _logits(head, states)[:, : wanted.vocab_size]}
        if head is None:
            return _loss_of_logits(states, wanted)
        return _loss_of_hidden(head, states, wanted)

    causal_lm.forward = forward
    causal_lm._forward_before = original


def _is_causal(causal_lm: Any, forward: Any) -> bool:
    """Tell whether a changed last token leaves the states before it as they were."""
    weight = causal_lm.get_output_embeddings().weight
    ids = torch.arange(8, device=weight.device)[None].repeat(2, 1) % weight.shape[0]  # [2, 8]
    ids[1, -1] = 0
    with record_head_inputs(causal_lm) as seen:
        for row in ids:
            forward(input_ids=row[None], use_cache=False)
    one, other = (states[0, :-1] for states in seen)  # [7, d]
    return same_states(other, one)


def _compute_by_regime(
    compute: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    rope: LengthDependentRope,
) -> torch.Tensor:
    """Return ``compute`` of each sequence as if alone, [B, L, d], in as few passes as that takes.

    A packed row is computed as it is: `decide_packing` sees to it that none mixes positions.
    """
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    width = input_ids.shape[1]
    lengths = [width] * len(input_ids) if mask is None else mask.sum(dim=1).tolist()
    parts, order = [], []
    for group in rope.groups(lengths):
        longest = max(lengths[row] for row in group)
        if rope.keeps_lengths(longest):
            with torch.no_grad():
                compute({"input_ids": input_ids[:1, :1]})
        rows = torch.tensor(group, device=input_ids.device)
        some = {name: tensor[rows, :longest] for name, tensor in inputs.items()}
        parts.append(pad(compute(some), (0, 0, 0, width - longest)))  # [b, L, d]
        order += group
    return torch.cat(parts)[torch.tensor(order, device=input_ids.device).argsort()]


def remove_sparse_loss(model: Any) -> None:
    """Give the model back its own ``forward``: a copy of it would compute with these weights."""
    causal_lm = _causal_lm(model)
    causal_lm.forward = causal_lm.__dict__.pop("_forward_before")


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _top_ids(head: OutputHead | None, states: torch.Tensor, wanted: TopTokens) -> torch.Tensor:
    if head is not None:
        with head.gathered():
            return head.top_ids(states, wanted.count, wanted.vocab_size)
    return states[:, : wanted.vocab_size].topk(wanted.count, dim=-1).indices


def _logits(head: OutputHead | None, states: torch.Tensor) -> torch.Tensor:
    if head is None:
        return states
    with head.gathered():
        return head.logits(states)


# The loss computes its own gradient: there is nothing in it for a compiler of the model.
@torch.compiler.disable
def _loss_of_hidden(
    head: OutputHead, hidden: torch.Tensor, targets: SparseTargets
) -> dict[str, torch.Tensor | SparseStatistics]:
    with head.gathered():
        loss, statistics = linear_sparse_jsd(
            hidden,  # [N, d]
            head.layer.weight,
            targets.teacher,
            bias=head.layer.bias,
            softcap=head.softcap,
            logit_scale=head.scale,
            beta=targets.beta,
            temperature=targets.temperature,
            normalizer=targets.normalizer,
            vocab_size=targets.vocab_size,
            tail=targets.tail,
            weights=targets.weights,
            labels=targets.labels,
            kernel=targets.kernel,
            return_statistics=True,
        )
    return {"loss": loss, "statistics": statistics}


@torch.compiler.disable
def _loss_of_logits(
    logits: torch.Tensor, targets: SparseTargets
) -> dict[str, torch.Tensor | SparseStatistics]:
    losses, statistics = sparse_generalized_jsd(
        logits[:, : targets.vocab_size],  # [N, V]
        targets.teacher,
        beta=targets.beta,
        temperature=targets.temperature,
        tail=targets.tail,
        weights=targets.weights,
        labels=targets.labels,
        kernel=targets.kernel,
        return_statistics=True,
    )
    return {"loss": losses.sum() / targets.normalizer, "statistics": statistics}
