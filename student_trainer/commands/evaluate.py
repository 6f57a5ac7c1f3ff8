"""The command `evaluate`: read and check the flags before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from student_trainer.config.checks import check_evaluate
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.files import check_rows_exist
from student_trainer.config.output import check_no_scores_are_overwritten
from student_trainer.config.parse import parse
from student_trainer.config.suites import where_from
from student_trainer.data.first_rows import first_rows
from student_trainer.evaluation.suites import problems_of
from student_trainer.runtime.folders import check_output_folder


def evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """Generate for every problem, check the completions, print and save the scores.

    Writes ``results.json`` and ``samples.jsonl`` (HumanEval's sample format, with the verdicts)
    into ``--output_dir``. Interrupted, the same command goes on with what it had generated.
    """
    model, dataset, generation, template, teacher, args = parse(
        argv,
        *ARGUMENTS["evaluate"],
        prog="student-trainer evaluate",
        description=(evaluate.__doc__ or "").split("\n")[0],
    )
    check_evaluate(model, dataset, generation, teacher, args)
    check_output_folder("--output_dir", args.output_dir)
    check_no_scores_are_overwritten(args)
    check_rows_exist(dataset)
    name, _, split, form = where_from(dataset, args.suite)
    if rows := first_rows(name, split):
        problems_of(rows, form)  # raises where a row has no checker, or is of another form
    from student_trainer.commands.run_evaluation import run_evaluation

    return run_evaluation(model, dataset, generation, template, teacher, args)
