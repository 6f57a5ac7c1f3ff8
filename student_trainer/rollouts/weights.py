"""The student's weights as a checkpoint would name them, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from student_trainer.model.merging import adapts_tied_weights
from student_trainer.runtime.compat import revert_weight_conversion


@dataclass(frozen=True)
class WeightShape:
    """The name, dtype and whole shape of a weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class StudentWeights:
    """The weights of a student, whole, as an iterable of pairs.

    Each iteration gives (name, tensor) as the weights are then. A sharded student (FSDP2, ZeRO-3)
    is gathered one layer at a time, so no rank holds the whole model; gathering is a collective,
    so all ranks must iterate together, to the end.

    Adapters are not merged in place, because unmerging leaves rounding errors in the base. Of tied
    weights only the first is given, as in a checkpoint, unless adapters change one.

    Args:
        model: the student, as it is called in training (a peft model too), not in DDP.
        dtype: dtype of the tensors that are given; that of integers is kept.

    Attributes:
        adapted: {name: LoRA layer} of the layers that adapters change.
        merged: whether adapters are added to the weights.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        from peft.tuners.lora import LoraLayer

        self.causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.dtype = dtype
        self.merged = True
        self.adapted = {
            name: module
            for name, module in self.causal_lm.named_modules()
            if isinstance(module, LoraLayer)
        }

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in self.layers():
            yield from layer.items()

    def layers(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what an iteration gives, layer by layer."""
        for layer in self._layers():
            whole = {name: self._whole(key, value) for name, (key, value) in layer.items()}
            yield revert_weight_conversion(self.causal_lm, whole)

    @property
    def size(self) -> int:
        """The bytes of all that an iteration gives."""
        return sum(math.prod(one.shape) * one.dtype.itemsize for one in self.shapes())

    def shapes(self) -> list[WeightShape]:
        """Return what an iteration will give, in its order, without gathering anything."""
        return [shape for layer in self._layer_shapes() for shape in layer]

    @property
    def largest_layer(self) -> int:
        """The bytes of the largest of `layers`."""
        return max(
            sum(math.prod(one.shape) * one.dtype.itemsize for one in layer)
            for layer in self._layer_shapes()
        )

    def _layer_shapes(self) -> Iterator[list[WeightShape]]:
        for layer in self._layers():
            empty = {
                name: torch.empty(
                    tuple(getattr(value, "ds_shape", value.shape)),
                    dtype=self._dtype_of(value),
                    device="meta",
                )
                for name, (_, value) in layer.items()
            }
            converted = revert_weight_conversion(self.causal_lm, empty)
            yield [WeightShape(n, w.dtype, tuple(w.shape)) for n, w in converted.items()]

    def _layers(self) -> list[dict[str, tuple[str, torch.Tensor]]]:
        """Return {name: (key in the model, weight)} of each layer, then of what is in none.

        A checkpoint may name and cut the weights of a layer otherwise (experts are fused in the
        model), so they are converted together.
        """
        tied: set[str] = set()
        if not adapts_tied_weights(self.causal_lm):
            names = {name for name, _ in self.causal_lm.named_parameters(remove_duplicate=False)}
            tied = names - {name for name, _ in self.causal_lm.named_parameters()}
        layers: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
        for key, value in self.causal_lm.state_dict(keep_vars=True).items():
            owner, _, own = key.partition(".base_layer.")
            if own:
                name = f"{owner}.{own}"
            elif key in tied or any(key.startswith(f"{prefix}.") for prefix in self.adapted):
                continue  # it is given under its first name, or added to the weight it adapts
            else:
                name = key
            layers.setdefault(_layer_of(name), {})[name] = (key, value)
        return list(layers.values())

    def _dtype_of(self, value: torch.Tensor) -> torch.dtype:
        return self.dtype if value.is_floating_point() else value.dtype

    @torch.no_grad()
    def _whole(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """Return a weight as a whole tensor of its own, `merged` with what adapters add."""
        owner, _, own = key.partition(".base_layer.")
        layer = self.adapted[owner] if own == "weight" and self.merged else None
        parts = [value] if layer is None else list(layer.parameters())
        with gathered(parts):
            whole = full(value).detach()
            if layer is not None:
                for adapter in layer.active_adapters:
                    whole = whole + full(layer.get_delta_weight(adapter)).to(whole.device)
            return whole.to(self._dtype_of(value), copy=True)


def _layer_of(name: str) -> str:
    """Return the part of a weight's name up to its first number, "" if it has none."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, p in enumerate(parts) if p.isdigit()), "")


def full(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor that FSDP2 has sharded as a whole one (a collective), any other as it is."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def gathered(weights: list[torch.Tensor]) -> AbstractContextManager[Any]:
    """Return a block in which weights that ZeRO-3 has sharded are whole."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # `zero` is an attribute of it, and no module that can be imported

    return deepspeed.zero.GatheredParameters([w for w in weights if hasattr(w, "ds_id")])
