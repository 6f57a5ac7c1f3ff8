"""The runs of `sft`, `distill` and `precompute`, once their flags are checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object

from shared.errors import ConfigurationError
from shared.logs import can_move
from student_trainer.commands.dry_run import dry_run
from student_trainer.commands.dry_run_teacher import dry_run_flags
from student_trainer.commands.run_summary import say_end, say_start
from student_trainer.config.arguments import DistillFlags, Recipe, SFTFlags, TeacherArguments
from student_trainer.config.machine import check_machine
from student_trainer.config.training_arguments import (
    CommonTrainingArguments,
    DistillArguments,
    training_arguments,
)
from student_trainer.data.sources import Rows, read_rows
from student_trainer.pipeline.planned_requests import (
    PlannedRequests,
    count_missing,
    planned_requests,
    send_all,
)
from student_trainer.pipeline.repeatability import check_repeats
from student_trainer.runtime.progress import counted
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.compatible import check_capabilities, check_same_teachers
from student_trainer.teacher.named import Teachers
from student_trainer.training.defaults import settle
from student_trainer.training.recipe import (
    Prepared,
    date_folders,
    fit_to_teacher,
    keep_template_date,
    prepare,
    run,
)
from student_trainer.training.teachers import (
    check_teacher_prompts,
    check_teachers_are_used,
    open_teachers,
)
from student_trainer.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

_REQUEST_SIZE = 16
_ROWS_REPEATED = 100  # among which are the first rows of each teacher


def run_sft(recipe: Recipe, flags: SFTFlags) -> None:
    """Fine-tune a model, or print what the run would do."""
    args = training_arguments(flags)
    check_machine(recipe, args)
    given, recipe = (*recipe.flags, flags), settle(recipe, args)
    rows = read_rows(recipe.dataset, recipe.data, args.seed)
    prepared = prepare(recipe, rows, args)
    if args.dry_run:
        dry_run(recipe, prepared, args)
        return
    keep_template_date(prepared, date_folders(args, None))
    _run(recipe, prepared, args, (*recipe.flags, args), given)


def run_distill(
    recipe: Recipe, teacher_flags: TeacherArguments, flags: DistillFlags
) -> DistillationTrainer | None:
    """Distill a teacher; return the trainer after its run, or None after a dry run."""
    args = training_arguments(flags)
    assert isinstance(args, DistillArguments)
    check_machine(recipe, args, teacher_flags)
    given, recipe = (*recipe.flags, teacher_flags, flags), settle(recipe, args)
    # Rows are read before the teacher is waited for, so that a missing file is reported at once.
    rows = read_rows(recipe.dataset, recipe.data, args.seed, _teachers_of_datasets(teacher_flags))
    if args.dry_run:
        teacher_flags = dry_run_flags(teacher_flags)
    # The requests of a stream are not known, so a cache cannot know that it holds all of them.
    alone = args.lmbda == 0 and not args.student_top_m and not recipe.data.streaming
    with open_teachers(teacher_flags, recipe.model, starts_alone=alone) as teachers:
        prepared = _connect_and_prepare(teachers, recipe, rows, args, teacher_flags)
        if args.dry_run:
            dry_run(recipe, prepared, args, teachers=teachers, teacher_flags=teacher_flags)
            return None
        keep_template_date(prepared, date_folders(args, teacher_flags.teacher_cache))
        all_flags = (*recipe.flags, teacher_flags, args)
        return _run(recipe, prepared, args, all_flags, given, teachers)


def _teachers_of_datasets(flags: TeacherArguments) -> dict[str, list[str]]:
    """Return the column that names a row's teacher, with its value for each dataset."""
    return {flags.teacher_column: flags.dataset_teacher} if flags.dataset_teacher else {}


def _run(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    flags: Sequence[Any],
    given: Sequence[Any],
    teachers: Teachers | None = None,
) -> DistillationTrainer:
    """Train, and say before what is about to happen and after it what is there."""
    say_start(recipe, prepared, args, teachers=teachers)
    trainer = run(recipe, prepared, args, teachers=teachers, flags=flags, given=given)
    if not trainer.stopped:
        say_end(recipe, prepared, args, trainer)
    return trainer


def _connect_and_prepare(
    teachers: Teachers,
    recipe: Recipe,
    rows: Rows,
    args: DistillArguments,
    teacher_flags: TeacherArguments,
) -> Prepared:
    """Return what the run learns from, once its teachers are known to be able to teach it.

    Raises:
        TeacherError, ConfigurationError, DatasetError: teacher, flags or rows cannot be used.
    """
    # All ranks go one way, since each of them meets the others while it prepares.
    early = None
    if not all(gather_object([teachers.ready()])):
        # The rows are made into examples now, so that a mistake in them is told before the wait.
        early = prepare(recipe, rows, args, teacher_flags=teacher_flags)
    for info in teachers.connect():
        check_capabilities(info, args, teacher_flags)
    check_same_teachers(teachers.identities)
    if early is None:
        prepared = prepare(recipe, rows, args, teachers=teachers, teacher_flags=teacher_flags)
    else:
        prepared = fit_to_teacher(
            early, recipe, rows, args, teachers=teachers, teacher_flags=teacher_flags
        )
    check_teachers_are_used(teachers, prepared)
    check_teacher_prompts(teachers, prepared, teacher_flags)
    tolerance = teacher_flags.teacher_repeat_tolerance
    some = prepared.train[: _ROWS_REPEATED if teachers.names else 2]
    for teacher, examples in teachers.by_teacher(some, lambda example: example.teacher):
        check_repeats(teacher, examples, prepared.method, tolerance=tolerance)
    return prepared


def run_precompute(recipe: Recipe, teacher_flags: TeacherArguments, flags: DistillFlags) -> None:
    """Fill the cache with the answers that a run needs off-policy, or print what that would do."""
    args = training_arguments(flags)
    assert isinstance(args, DistillArguments)
    check_machine(recipe, args, teacher_flags)
    if args.world_size > 1:
        raise ConfigurationError(
            f"precompute runs in one process, not in {args.world_size}: start it without a launcher"
        )
    rows = read_rows(recipe.dataset, recipe.data, args.seed, _teachers_of_datasets(teacher_flags))
    if args.dry_run:
        teacher_flags = dry_run_flags(teacher_flags)
    with open_teachers(teacher_flags, recipe.model, starts_alone=True) as teachers:
        prepared = _connect_and_prepare(teachers, recipe, rows, args, teacher_flags)
        planned = planned_requests(
            teachers.all_names, prepared.method, prepared.train, prepared.held_out
        )
        if args.dry_run:
            dry_run(
                recipe,
                prepared,
                args,
                teachers=teachers,
                teacher_flags=teacher_flags,
                planned=sum(map(len, planned)),
            )
            return
        keep_template_date(prepared, date_folders(args, teacher_flags.teacher_cache)[-1:])
        missing, known, total, corrupt = 0, 0, 0, 0
        for requests in planned:
            client = teachers.of(requests.teacher)
            assert isinstance(client, CachedTeacher)  # `precompute` requires --teacher_cache
            found = _fill(client, requests, show=not (args.disable_tqdm and can_move()))
            missing, known = missing + found.missing, known + found.known
            total, corrupt = total + len(requests), corrupt + found.corrupt
    logger.warning(
        "%d of %d answers are in --teacher_cache %s; %d were there before, %d were corrupt",
        total - missing, total, teacher_flags.teacher_cache, known, corrupt,
    )  # fmt: skip
    if missing:
        raise ConfigurationError(
            f"{missing} of {total} answers did not fit: raise --teacher_cache_max_gb "
            f"{teacher_flags.teacher_cache_max_gb:g}"
        )


@dataclass(frozen=True)
class _Filled:
    """The answers that a cache lacks after it was filled, held before, and found corrupt."""

    missing: int
    known: int
    corrupt: int


def _fill(client: CachedTeacher, requests: PlannedRequests, *, show: bool) -> _Filled:
    """Request all planned answers of one teacher, which its cache keeps."""
    missing, total = count_missing(client, requests)
    client.require(missing, total)
    known = total - missing
    whom = f"Answers of {requests.teacher or 'the teacher'}"
    with counted(total, whom, show=show) as count:
        for answers in send_all(client, requests, size=_REQUEST_SIZE):
            count(answers)
    missing, _ = count_missing(client, requests)
    _, _, corrupt = client.take_lookups()
    return _Filled(missing, known, corrupt)
