"""The examples of a run whose steps have several completions of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from student_trainer.data.sample import Example


class Generations(Sequence[Example]):
    """A sequence that has each example several times in a row, numbered from 0 by `generation`.

    Args:
        examples: of the dataset or of a stream.
        each: how often each example is there.
    """

    def __init__(self, examples: Sequence[Example], each: int) -> None:
        self.examples = examples
        self.each = each

    def __len__(self) -> int:
        return len(self.examples) * self.each

    def __getitem__(self, place: int) -> Example:  # type: ignore[override]
        row, generation = divmod(place, self.each)
        return replace(self.examples[row], generation=generation)
