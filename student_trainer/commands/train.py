"""The commands `sft` and `distill`: read and check the flags before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from student_trainer.config.arguments import DistillFlags, Recipe, TeacherArguments
from student_trainer.config.checks import check_distillation, check_recipe
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.output import check_nothing_is_overwritten
from student_trainer.config.parse import parse
from student_trainer.data.first_rows import check_first_rows
from student_trainer.runtime.folders import check_output_folder


def sft(argv: Sequence[str]) -> None:
    """Fine-tune a model on the dataset's completions."""
    *parts, flags = parse(
        argv, *ARGUMENTS["sft"], prog="student-trainer sft", description=sft.__doc__ or ""
    )
    recipe = Recipe(*parts)
    check_recipe(recipe, flags)
    check_output_folder("--output_dir", flags.output_dir)
    check_nothing_is_overwritten(flags, recipe.model)
    check_first_rows(recipe.dataset, recipe.data)
    from student_trainer.commands.run_training import run_sft

    run_sft(recipe, flags)


def distill(argv: Sequence[str]) -> None:
    """Learn from a served teacher: Supervised KD, SeqKD, on-policy GKD, or a mixture."""
    *parts, teacher, flags = parse(
        argv,
        *ARGUMENTS["distill"],
        prog="student-trainer distill",
        description=distill.__doc__ or "",
    )
    recipe = Recipe(*parts)
    check_before_loading(recipe, teacher, flags)
    from student_trainer.commands.run_training import run_distill

    run_distill(recipe, teacher, flags)


def check_before_loading(recipe: Recipe, teacher: TeacherArguments, flags: DistillFlags) -> None:
    """Check all of a distillation that needs no model, teacher or tokenizer.

    Raises:
        ConfigurationError, DatasetError: a flag, a folder or a row cannot be used.
    """
    check_distillation(recipe, teacher, flags)
    check_output_folder("--output_dir", flags.output_dir)
    if teacher.teacher_cache is not None:
        check_output_folder("--teacher_cache", teacher.teacher_cache)
    check_nothing_is_overwritten(flags, recipe.model)
    check_first_rows(recipe.dataset, recipe.data)
