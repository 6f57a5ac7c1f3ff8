"""The student's forward pass, extended to return the loss instead of all logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from shared.errors import ConfigurationError
from shared.rope import LengthDependentRope, length_dependent_rope
from student_trainer.losses import (
    Divergence,
    HardLabels,
    Kernel,
    SparseDistribution,
    SparseStatistics,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from student_trainer.model.head import OutputHead, find_head, float32_logits
from student_trainer.model.in_place import gradient_of, rows_added_in_place
from student_trainer.model.probe import probe_model, record_head_inputs, same_states

_INPUTS = ("input_ids", "attention_mask", "position_ids")  # packed inputs have no mask


@dataclass(frozen=True)
class SparseTargets:
    """The targets of a micro-batch's loss, and how it is computed.

    Attributes:
        positions: [N] int64, index into the flattened inputs of the hidden state that predicts each
            learned token: ``b·L + position`` where sequences are padded.
        teacher: the teacher's distributions at these positions.
        divergence: of teacher and student at each position.
        normalizer: learned tokens of the whole optimizer step, over ranks and micro-batches.
        vocab_size: size of the shared vocabulary; student logits of other ids are left out.
        weights: [N] weight of each divergence; None for 1.
        labels: the data's next tokens, and the weights of their cross-entropy.
        kernel: implementation of the loss.
        in_place: add the gradients of output layer and embedding to ``.grad``, see `in_place`; the
            caller runs the backward pass of the loss once, with the factor 1.
        taught: (teacher's name, positions) of each sample in turn, for statistics; None is the
            first teacher.
    """

    positions: torch.Tensor
    teacher: SparseDistribution
    divergence: Divergence
    normalizer: float
    vocab_size: int
    weights: torch.Tensor | None = None
    labels: HardLabels | None = None
    kernel: Kernel = "auto"
    in_place: bool = False
    taught: Sequence[tuple[str | None, int]] = ()

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
    """A request for the student's own most probable tokens.

    Attributes:
        positions: [N] int64, as in `SparseTargets`.
        count: ids for each position.
        vocab_size: only ids below it are returned.
    """

    positions: torch.Tensor
    count: int
    vocab_size: int


@dataclass(frozen=True)
class PositionLogits:
    """A request for the logits at a few positions.

    Attributes:
        positions: [N] int64, as in `SparseTargets`.
        vocab_size: only logits of ids below it are returned.
    """

    positions: torch.Tensor
    vocab_size: int


def install_sparse_loss(model: Any) -> None:
    """Add the arguments ``sparse_targets``, ``top_tokens``, ``position_logits`` to ``forward``.

    Everything must be computed inside ``forward``, because DDP, FSDP and autocast wrap it. With
    ``sparse_targets`` it returns ``{"loss": scalar, "statistics": SparseStatistics}``, with
    ``top_tokens`` ``{"token_ids": [N, count]}``, with ``position_logits`` ``{"logits": [N,
    vocab_size]}``; the logits of all positions never exist. Without these it is unchanged.

    Args:
        model: a causal language model of transformers, or a peft model around one.

    Raises:
        ConfigurationError: the model is an encoder: a later token changes the logits of earlier
            ones.
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
        """Return hidden states [B, L, d], or logits [B, L, V] where there is no `OutputHead`."""
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
        in_place = sparse_targets is not None and sparse_targets.in_place
        embedding = causal_lm.get_input_embeddings() if in_place else None
        with rows_added_in_place(embedding):
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
    """Return whether the states of all tokens but the last are unchanged by another last token."""
    weight = causal_lm.get_output_embeddings().weight
    ids = torch.arange(8, device=weight.device)[None].repeat(2, 1) % weight.shape[0]  # [2, 8]
    ids[1, -1] = 0
    with record_head_inputs(causal_lm) as seen:
        for sequence in ids:
            forward(input_ids=sequence[None], use_cache=False)
    one, other = (states[0, :-1] for states in seen)  # [7, d]
    return same_states(other, one)


def _compute_by_regime(
    compute: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    rope: LengthDependentRope,
) -> torch.Tensor:
    """Return ``compute(inputs)`` [B, L, d] with the rope frequencies of each sequence's own length.

    Sequences of equal frequencies share a forward pass. Packed sequences are computed as they are,
    because `decide_packing` refuses lengths that change the frequencies.
    """
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    width = input_ids.shape[1]
    lengths = [width] * len(input_ids) if mask is None else mask.sum(dim=1).tolist()
    parts, order = [], []
    for group in rope.groups(lengths):
        longest = max(lengths[index] for index in group)
        if rope.keeps_lengths(longest):
            with torch.no_grad():
                compute({"input_ids": input_ids[:1, :1]})
        indices = torch.tensor(group, device=input_ids.device)
        some = {name: tensor[indices, :longest] for name, tensor in inputs.items()}
        parts.append(pad(compute(some), (0, 0, 0, width - longest)))  # [b, L, d]
        order += group
    return torch.cat(parts)[torch.tensor(order, device=input_ids.device).argsort()]


def remove_sparse_loss(model: Any) -> None:
    """Restore the model's own ``forward``, because a copied model would call this model's."""
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


# torch.compile has nothing to gain here, because the loss computes its own gradient.
@torch.compiler.disable
def _loss_of_hidden(
    head: OutputHead, hidden: torch.Tensor, targets: SparseTargets
) -> dict[str, torch.Tensor | SparseStatistics]:
    with head.gathered():
        found = linear_sparse_jsd(
            hidden,  # [N, d]
            head.layer.weight,
            targets.teacher,
            targets.divergence,
            bias=head.layer.bias,
            softcap=head.softcap,
            logit_scale=head.scale,
            normalizer=targets.normalizer,
            vocab_size=targets.vocab_size,
            weights=targets.weights,
            labels=targets.labels,
            kernel=targets.kernel,
            add_to=gradient_of(head.layer.weight) if targets.in_place else None,
        )
    return found._asdict()


@torch.compiler.disable
def _loss_of_logits(
    logits: torch.Tensor, targets: SparseTargets
) -> dict[str, torch.Tensor | SparseStatistics]:
    found = sparse_generalized_jsd(
        logits[:, : targets.vocab_size],  # [N, V]
        targets.teacher,
        targets.divergence,
        weights=targets.weights,
        labels=targets.labels,
        kernel=targets.kernel,
    )
    return {"loss": found.loss.sum() / targets.normalizer, "statistics": found.statistics}
