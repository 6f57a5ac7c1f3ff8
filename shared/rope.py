"""Describe rotary positions whose frequencies depend on the longest sequence of a batch.

Teacher and student must both keep such sequences apart, or a neighbour changes their log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LengthDependentRope:
    """A rule that tells which sequence lengths share their rotary frequencies.

    Attributes:
        original: longest length in tokens that has the frequencies of the original training.
        each_length: whether each longer length has frequencies of its own (dynamic NTK), instead of
            one set for all longer ones (longrope).
    """

    original: int
    each_length: bool

    def regime(self, length: int) -> int:
        """Return a number that is equal for lengths with the same frequencies."""
        if length <= self.original:
            return 0
        return length if self.each_length else 1

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the indices of sequences that may share a forward pass, group by group."""
        found: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            found.setdefault(self.regime(length), []).append(index)
        return list(found.values())

    def keeps_lengths(self, longest: int) -> bool:
        """Return whether a forward pass over ``longest`` tokens changes later ones.

        transformers keeps the frequencies of dynamic NTK until a sequence is shorter than the
        original length: a forward pass over one token resets the model.
        """
        return self.each_length and longest >= self.original


def length_dependent_rope(config: Any) -> LengthDependentRope | None:
    """Return the length-dependent rope of a transformers config, or None if it has none.

    Source: `transformers.modeling_rope_utils.dynamic_rope_update`.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    context = getattr(config, "max_position_embeddings", None)
    kinds = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    originals: list[int] = []
    each_length = False
    for kind in kinds:
        name = str(kind.get("rope_type", kind.get("type", "")))
        if "dynamic" in name and context:
            originals.append(int(context))
            each_length = True
        elif name in ("longrope", "su"):
            original = kind.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", context)
            if original:
                originals.append(int(original))
    if not originals:
        return None
    return LengthDependentRope(min(originals), each_length or len(set(originals)) > 1)
