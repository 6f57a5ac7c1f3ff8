"""What `sft`, `distill` and `precompute` do once their flags are checked."""

from __future__ import annotations

import logging

from shared.errors import ConfigurationError
from student_trainer.commands.dry_run import asked_briefly, dry_run
from student_trainer.config.arguments import DistillFlags, Recipe, SFTFlags, TeacherArguments
from student_trainer.config.machine import check_machine
from student_trainer.config.training_arguments import DistillArguments, training_arguments
from student_trainer.data.sources import read_rows
from student_trainer.pipeline.planned_requests import count_missing, planned_requests, send_all
from student_trainer.pipeline.repeatability import check_repeats
from student_trainer.runtime.progress import counted
from student_trainer.runtime.terminal import can_move
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.compatible import check_capabilities, check_one_teacher
from student_trainer.training.recipe import (
    date_folders,
    keep_template_date,
    open_teacher,
    prepare,
    run,
)
from student_trainer.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

_REQUEST_SIZE = 16


def run_sft(recipe: Recipe, flags: SFTFlags) -> None:
    """Fine-tune, or show what a run would do."""
    args = training_arguments(flags)
    check_machine(recipe, args)
    rows = read_rows(recipe.dataset, recipe.data, args.seed)
    prepared = prepare(recipe, rows, args)
    if args.dry_run:
        dry_run(recipe, prepared, args)
        return
    keep_template_date(prepared, date_folders(args, None))
    run(recipe, prepared, args, teacher=None, flags=(*recipe.flags, args))


def run_distill(
    recipe: Recipe, teacher: TeacherArguments, flags: DistillFlags
) -> DistillationTrainer | None:
    """Distill; return the trainer after its run, or None after a dry one."""
    args = training_arguments(flags)
    assert isinstance(args, DistillArguments)
    check_machine(recipe, args, teacher)
    # Read before a teacher is waited for, so that a missing file is told at once.
    rows = read_rows(recipe.dataset, recipe.data, args.seed)
    if args.dry_run:
        teacher = asked_briefly(teacher)
    # What a stream will request is not known, so a cache cannot tell that it holds all of it.
    alone = args.lmbda == 0 and not args.student_top_m and not recipe.data.streaming
    with open_teacher(teacher, recipe.model, starts_alone=alone) as client:
        check_capabilities(client.connect(), args, teacher)
        check_one_teacher(client.info.teacher)
        prepared = prepare(recipe, rows, args, teacher=client, asked=teacher)
        check_repeats(
            client, prepared.train, prepared.method, tolerance=teacher.teacher_repeat_tolerance
        )
        if args.dry_run:
            dry_run(recipe, prepared, args, teacher=client, asked=teacher)
            return None
        keep_template_date(prepared, date_folders(args, teacher.teacher_cache))
        all_flags = (*recipe.flags, teacher, args)
        return run(recipe, prepared, args, teacher=client, flags=all_flags)


def run_precompute(recipe: Recipe, teacher: TeacherArguments, flags: DistillFlags) -> None:
    """Fill the cache with all that a run will request off-policy, or show what that would be."""
    args = training_arguments(flags)
    assert isinstance(args, DistillArguments)
    check_machine(recipe, args, teacher)
    if args.world_size > 1:
        raise ConfigurationError(
            f"precompute runs in one process, not in {args.world_size}: start it without a launcher"
        )
    rows = read_rows(recipe.dataset, recipe.data, args.seed)
    if args.dry_run:
        teacher = asked_briefly(teacher)
    with open_teacher(teacher, recipe.model, starts_alone=True) as client:
        check_capabilities(client.connect(), args, teacher)
        prepared = prepare(recipe, rows, args, teacher=client, asked=teacher)
        check_repeats(
            client, prepared.train, prepared.method, tolerance=teacher.teacher_repeat_tolerance
        )
        asked = planned_requests(prepared.method, prepared.train, prepared.held_out)
        if args.dry_run:
            dry_run(recipe, prepared, args, teacher=client, asked=teacher, questions=len(asked))
            return
        keep_template_date(prepared, date_folders(args, teacher.teacher_cache)[-1:])
        assert isinstance(client, CachedTeacher)  # --teacher_cache is there
        missing, wanted = count_missing(client, asked)
        client.require(missing, wanted)
        known = wanted - missing
        with counted(
            len(asked), "Asking the teacher", show=not (args.disable_tqdm and can_move())
        ) as count:
            for answers in send_all(client, asked, size=_REQUEST_SIZE):
                count(answers)
        missing, wanted = count_missing(client, asked)
        _, _, corrupt = client.take_lookups()
    logger.warning(
        "%d of %d answers are in --teacher_cache %s; %d were there before, %d were corrupt",
        wanted - missing, wanted, teacher.teacher_cache, known, corrupt,
    )  # fmt: skip
    if missing:
        raise ConfigurationError(
            f"{missing} of {wanted} answers did not fit: raise --teacher_cache_max_gb "
            f"{teacher.teacher_cache_max_gb:g}"
        )
