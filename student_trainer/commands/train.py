"""`sft` and `distill`: from flags to a trained model in a folder."""

from __future__ import annotations

from collections.abc import Sequence

from student_trainer.commands.dry_run import asked_briefly, dry_run
from student_trainer.config.arguments import DistillArguments, TeacherArguments
from student_trainer.config.checks import (
    check_distill,
    check_rollouts,
)
from student_trainer.config.parse import ARGUMENTS, parse
from student_trainer.data.sources import read_rows
from student_trainer.pipeline.repeatability import check_repeats
from student_trainer.teacher.compatible import check_capabilities, check_one_teacher
from student_trainer.training.recipe import (
    Recipe,
    check_recipe,
    date_folders,
    keep_template_date,
    open_teacher,
    prepare,
    run,
)
from student_trainer.training.trainer import DistillationTrainer


def sft(argv: Sequence[str]) -> None:
    """Supervised fine-tuning on the dataset's completions."""
    *parts, args = parse(
        argv, *ARGUMENTS["sft"], prog="student-trainer sft", description=sft.__doc__ or ""
    )
    recipe = Recipe(*parts)
    check_recipe(recipe, args)
    rows = read_rows(recipe.dataset, recipe.data, args.seed)
    prepared = prepare(recipe, rows, args)
    if args.dry_run:
        dry_run(recipe, prepared, args)
        return
    keep_template_date(prepared, date_folders(args, None))
    run(recipe, prepared, args, teacher=None, distill=None, flags=(*recipe.flags, args))


def distill(argv: Sequence[str]) -> None:
    """Distillation from a served teacher: Supervised KD, SeqKD, on-policy GKD, or a mixture."""
    *parts, teacher, args = parse(
        argv,
        *ARGUMENTS["distill"],
        prog="student-trainer distill",
        description=distill.__doc__ or "",
    )
    distilled(Recipe(*parts), teacher, args)


def distilled(
    recipe: Recipe, teacher: TeacherArguments, args: DistillArguments
) -> DistillationTrainer | None:
    """The trainer after its run, or None after a dry one; for `distill` and the Python API."""
    check_distill(args, teacher)
    check_rollouts(args, recipe.adapters)
    check_recipe(recipe, args)
    rows = read_rows(
        recipe.dataset, recipe.data, args.seed
    )  # a missing file is told before a teacher is waited for
    if args.dry_run:
        teacher = asked_briefly(teacher)
    # What a stream will ask is not known, so a cache cannot tell that it holds all of it.
    alone = args.lmbda == 0 and not args.student_top_m and not recipe.data.streaming
    with open_teacher(teacher, recipe.model, starts_alone=alone) as client:
        check_capabilities(client.connect(), args, teacher)
        check_one_teacher(client.info.teacher)
        prepared = prepare(recipe, rows, args, distill=args, teacher=client, asked=teacher)
        check_repeats(
            client, prepared.train, prepared.method, tolerance=teacher.teacher_repeat_tolerance
        )
        if args.dry_run:
            dry_run(recipe, prepared, args, teacher=client, asked=teacher)
            return None
        keep_template_date(prepared, date_folders(args, teacher.teacher_cache))
        flags = (*recipe.flags, teacher, args)
        return run(recipe, prepared, args, teacher=client, distill=args, flags=flags)
