"""`precompute`: everything that a run will ask off-policy, asked beforehand."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shared.errors import ConfigurationError
from student_trainer.commands.dry_run import asked_briefly, dry_run
from student_trainer.config.checks import check_distill, check_precompute
from student_trainer.config.parse import ARGUMENTS, parse
from student_trainer.data.sources import read_rows
from student_trainer.pipeline.planned_requests import count_missing, planned_requests, send_all
from student_trainer.pipeline.repeatability import check_repeats
from student_trainer.runtime.progress import counted
from student_trainer.runtime.terminal import can_move
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.compatible import check_capabilities
from student_trainer.training.recipe import (
    Recipe,
    check_recipe,
    date_folders,
    keep_template_date,
    open_teacher,
    prepare,
)

logger = logging.getLogger(__name__)

_REQUEST_SIZE = 16


def precompute(argv: Sequence[str]) -> None:
    """Fill --teacher_cache with what `distill` with the same flags asks off-policy, untrained.

    Every row is asked, whatever --max_steps says, in one process. What is there already is not
    asked again, so an interrupted run goes on where it was.
    """
    *parts, teacher, args = parse(
        argv,
        *ARGUMENTS["distill"],
        prog="student-trainer precompute",
        description=precompute.__doc__ or "",
    )
    recipe = Recipe(*parts)
    check_distill(args, teacher)
    check_precompute(args, teacher, recipe.data)
    check_recipe(recipe, args)
    if args.world_size > 1:
        raise ConfigurationError(
            f"precompute runs in one process, not in {args.world_size}: start it without a launcher"
        )
    rows = read_rows(recipe.dataset, recipe.data, args.seed)
    if args.dry_run:
        teacher = asked_briefly(teacher)
    with open_teacher(teacher, recipe.model, starts_alone=True) as client:
        check_capabilities(client.connect(), args, teacher)
        prepared = prepare(recipe, rows, args, distill=args, teacher=client, asked=teacher)
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
