"""Parse the flags of `student-trainer study`, run it, and print its progress."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.command_line import OneLineParser
from shared.errors import ConfigurationError
from student_trainer.runtime.folders import check_output_folder
from student_trainer.runtime.signals import signals_as_exits
from student_trainer.study.plan import Plan, make_plan, select
from student_trainer.study.report import write_report
from student_trainer.study.runner import Runner
from student_trainer.study.spec import TRAINER_COMMANDS, Study, load_study, to_argv


def study(argv: Sequence[str]) -> None:
    """Run the cells of a study that are not done yet, and compare them over seeds.

    Raises:
        ConfigurationError: a mistake in the file or the flags, before anything runs.
        CellFailedError, TeacherUnreachableError: a cell failed; what is finished stays.
    """
    arguments = make_parser().parse(argv)
    found = load_study(arguments.file)
    if any(cell.command in TRAINER_COMMANDS for cell in found.cells.values()):
        # Imported here, so that a study of other programs does not wait for torch.
        from student_trainer.study.flags import check_flags, check_rows

        check_flags(found)
        if not arguments.report:
            check_rows(found)
    seeds = _seeds(arguments.seeds) if arguments.seeds else found.seeds
    folder = arguments.output_dir or Path("runs") / arguments.file.stem
    # Planned for all seeds, because the report includes those that were run earlier.
    plan = make_plan(found, sorted({*found.seeds, *seeds}))
    jobs = select(found, plan, seeds, arguments.only)
    runner = Runner(folder, to_argv(found.serve), _say)
    if arguments.dry_run:
        for job in jobs:
            _say(f"{runner.state(job):<8} {job.folder}\n         $ {runner.command(job)}")
        count = sum(runner.state(job) == "done" for job in jobs)
        _say(f"{count} of {len(jobs)} are done")
        return
    check_output_folder("--output_dir", folder)
    if not arguments.report:
        with signals_as_exits():  # so that the running cell and the server end too
            runner.run(jobs, plan if found.drop_weights else None)
    measured = _measured(found, plan, runner)
    if arguments.report and not measured:
        raise ConfigurationError(f"--report: {folder} holds no measured cell of {found.path}")
    seconds = sum(runner.seconds(job) or 0.0 for job in plan.jobs.values())
    for path in write_report(found, measured, seconds, folder) if measured else []:
        _say(f"wrote {path}")


def _measured(
    found: Study, plan: Plan, runner: Runner
) -> dict[str, dict[str, dict[int | None, float]]]:
    """Return metric -> measured cell -> seed -> value (seed None: one for all seeds).

    Cells that are not done are left out; nothing is returned where none is done.

    Raises:
        ConfigurationError: the measuring command does not write a metric.
    """
    values: dict[str, dict[str, dict[int | None, float]]] = {}
    for (name, _), folder in plan.folder_of.items():
        measures, job = found.cells[name].measures, plan.jobs[folder]
        if measures is None or runner.state(job) != "done":
            continue
        path = runner.folder / folder / "results.json"
        results = json.loads(path.read_text())
        for metric in found.metrics():
            if metric not in results:
                key = "measure.metric" if metric == found.metric else "tables"
                raise ConfigurationError(
                    f"{found.path}: {key}: {path} has no {metric!r}; there is {', '.join(results)}"
                )
            of_metric = values.setdefault(metric, {})
            of_metric.setdefault(measures, {})[job.seed] = float(results[metric])
    return values


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="student-trainer study",
        description="Run the cells of a study that are not done yet, and compare them over seeds.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml")
    parser.add_argument("--output_dir", type=Path, help="default: runs/ and the file's name")
    parser.add_argument("--seeds", help="such as 0..4 or 0,3; default: those of the file")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="only cells of this name or of this table, with inputs and measures; may be repeated",
    )
    parser.add_argument("--dry_run", action="store_true", help="list what would run, and stop")
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write the report of what is done"
    )
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    """Parse seeds, given as ``FROM..TO`` or as a list.

    Raises:
        ConfigurationError: the text is neither.
    """
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        seeds = tuple(range(int(found[1]), int(found[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        seeds = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    else:
        seeds = ()
    if not seeds:
        raise ConfigurationError(f"--seeds {text} is neither FROM..TO nor a list such as 0,3")
    return seeds


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
