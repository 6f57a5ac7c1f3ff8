"""The flags of a run that are not of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from student_trainer.config.arguments.data import (
    DataArguments,
    DatasetArguments,
    TemplateArguments,
)
from student_trainer.config.arguments.model import AdapterArguments, ModelArguments
from student_trainer.config.arguments.teacher import GenerationArguments


@dataclass(frozen=True)
class Recipe:
    """The flags that `sft` and `distill` share, besides those of training."""

    model: ModelArguments
    adapters: AdapterArguments
    dataset: DatasetArguments
    data: DataArguments
    generation: GenerationArguments
    template: TemplateArguments = field(default_factory=TemplateArguments)

    @property
    def flags(self) -> tuple[Any, ...]:
        """The dataclasses of this recipe, in the order of `config.commands`."""
        return (
            self.model, self.adapters, self.dataset, self.data, self.generation, self.template,
        )  # fmt: skip
