"""The checks of flags, alone and together, that need no torch; a file a subject.

`config.machine` has the checks that need torch and transformers.
"""

from student_trainer.config.checks.datasets import check_datasets
from student_trainer.config.checks.distill import (
    check_distill,
    check_distillation,
    check_precompute,
)
from student_trainer.config.checks.evaluate import check_evaluate
from student_trainer.config.checks.model import (
    check_adapters,
    check_generation,
    check_merge,
    check_model,
    holds_adapters,
)
from student_trainer.config.checks.recipe import UNSUPPORTED, check_recipe
from student_trainer.config.checks.rollouts import check_rollouts
from student_trainer.config.checks.teacher import api_key_of, check_dataset_teachers, check_teacher

__all__ = [
    "UNSUPPORTED",
    "api_key_of",
    "check_adapters",
    "check_dataset_teachers",
    "check_datasets",
    "check_distill",
    "check_distillation",
    "check_evaluate",
    "check_generation",
    "check_merge",
    "check_model",
    "check_precompute",
    "check_recipe",
    "check_rollouts",
    "check_teacher",
    "holds_adapters",
]
