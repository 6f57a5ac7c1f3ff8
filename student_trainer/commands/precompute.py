"""`precompute`: flags, read and checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from student_trainer.config.arguments import Recipe
from student_trainer.config.checks import check_distill, check_precompute, check_recipe
from student_trainer.config.parse import ARGUMENTS, parse


def precompute(argv: Sequence[str]) -> None:
    """Fill --teacher_cache with what `distill` with the same flags asks off-policy, untrained.

    Every row is asked, whatever --max_steps says, in one process. What is there already is not
    asked again, so an interrupted run goes on where it was.
    """
    *parts, teacher, flags = parse(
        argv,
        *ARGUMENTS["distill"],
        prog="student-trainer precompute",
        description=precompute.__doc__ or "",
    )
    recipe = Recipe(*parts)
    check_distill(flags, teacher)
    check_precompute(flags, teacher, recipe.data)
    check_recipe(recipe, flags)
    from student_trainer.commands.run_training import run_precompute

    run_precompute(recipe, teacher, flags)
