"""The command `precompute`: read and check the flags before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from student_trainer.config.arguments import Recipe
from student_trainer.config.checks import (
    check_dataset_teachers,
    check_distill,
    check_precompute,
    check_recipe,
)
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.parse import parse
from student_trainer.data.first_rows import check_first_rows
from student_trainer.runtime.folders import check_output_folder


def precompute(argv: Sequence[str]) -> None:
    """Fill --teacher_cache with the answers that `distill` with the same flags needs off-policy.

    Every row is requested, whatever --max_steps says, in one process and without training.
    Answers in the cache are not requested again, so an interrupted run goes on where it was.
    """
    *parts, teacher, flags = parse(
        argv,
        *ARGUMENTS["precompute"],
        prog="student-trainer precompute",
        description=precompute.__doc__ or "",
    )
    recipe = Recipe(*parts)
    check_distill(flags, teacher)
    check_dataset_teachers(teacher, recipe.dataset)
    check_precompute(flags, teacher, recipe.data)
    check_recipe(recipe, flags)
    check_output_folder("--output_dir", flags.output_dir)
    check_output_folder("--teacher_cache", teacher.teacher_cache)
    check_first_rows(recipe.dataset, recipe.data)
    from student_trainer.commands.run_training import run_precompute

    run_precompute(recipe, teacher, flags)
