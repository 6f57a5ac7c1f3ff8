"""The flags of the trainer: each is a field of one of these dataclasses of plain values.

`sft` and `distill` also take the flags of transformers' `TrainingArguments`, which
`config.training_arguments` builds once all flags are checked. `config.checks` has the checks.
"""

from student_trainer.config.arguments.data import (
    ROW_OPTIONS,
    DataArguments,
    DatasetArguments,
    TemplateArguments,
)
from student_trainer.config.arguments.distillation import (
    SFT,
    DistillFlags,
    DivergenceFlags,
    divergence_flags_of,
)
from student_trainer.config.arguments.evaluation import EvaluateArguments, MergeArguments
from student_trainer.config.arguments.model import AdapterArguments, LoadedModel, ModelArguments
from student_trainer.config.arguments.recipe import Recipe
from student_trainer.config.arguments.rollouts import RolloutFlags
from student_trainer.config.arguments.teacher import GenerationArguments, TeacherArguments
from student_trainer.config.arguments.training import (
    RunFlags,
    SFTFlags,
    TrainingFlags,
    traced_steps,
    uses_deepspeed,
    uses_fsdp,
)

__all__ = [
    "ROW_OPTIONS",
    "SFT",
    "AdapterArguments",
    "DataArguments",
    "DatasetArguments",
    "DistillFlags",
    "DivergenceFlags",
    "EvaluateArguments",
    "GenerationArguments",
    "LoadedModel",
    "MergeArguments",
    "ModelArguments",
    "Recipe",
    "RolloutFlags",
    "RunFlags",
    "SFTFlags",
    "TeacherArguments",
    "TemplateArguments",
    "TrainingFlags",
    "divergence_flags_of",
    "traced_steps",
    "uses_deepspeed",
    "uses_fsdp",
]
