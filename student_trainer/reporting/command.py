"""Run `student-trainer report`: write a page, and plots, of runs."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.command_line import OneLineParser
from shared.errors import ConfigurationError
from student_trainer.reporting.curves import charts_of
from student_trainer.reporting.differences import difference_tables
from student_trainer.reporting.page import Chart, Range, Report, SideBySide, Table, Token, render
from student_trainer.reporting.runs import (
    Evaluation,
    Found,
    StudyRun,
    TrainingRun,
    find_runs,
    find_runs_so_far,
)
from student_trainer.reporting.statistics import wilson_interval
from student_trainer.reporting.svg import check_png, format_number, write_lines, write_png
from student_trainer.reporting.watch import status_lines, watch

_AUTHORS = {"dataset": "Reference", "teacher": "Teacher's"}
_SAMPLES = 6


def report(argv: Sequence[str]) -> None:
    """Write a page, and plots if they are wanted, of the runs in some folders, or serve it.

    Raises:
        ConfigurationError: a folder without a run, one that cannot be written to, flags that have
            no effect together, or a port that is taken.
        DatasetError: a file of a run that cannot be read.
    """
    arguments = make_parser().parse(argv)
    _check(arguments)
    if arguments.watch:
        watch(lambda: _live_page(arguments), arguments.port)
        return
    page = page_of(find_runs(arguments.runs), _title(arguments))
    output = arguments.output or arguments.runs[0] / "report.html"
    try:
        output.write_text(render(page), encoding="utf-8")
        sys.stdout.write(f"wrote {output}\n")
        if arguments.plots:
            arguments.plots.mkdir(parents=True, exist_ok=True)
            _write_plots(page.charts, arguments.plots, png=arguments.png)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}") from error


def _live_page(arguments: argparse.Namespace) -> Report:
    found, missing = find_runs_so_far(arguments.runs)
    status = " ".join(status_lines(found, missing, time.time()))
    return page_of(found, _title(arguments), status)


def page_of(found: Found, title: str, status: str = "") -> Report:
    """Return the content of the page."""
    numbers = {run.name: number for number, run in enumerate(found.training)}
    return Report(
        title=title,
        lead=_lead(found),
        status=status,
        tables=_tables(found),
        charts=charts_of(found.training),
        seconds={run.name: run.seconds() for run in found.training if run.seconds()},
        numbers=numbers,
        samples=[*_shaded(found.training), *_completions(found)],
    )


def _write_plots(charts: Sequence[Chart], folder: Path, *, png: bool) -> None:
    for chart in charts:
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
        path = folder / f"{name}.svg"
        write_lines(
            path,
            chart.title,
            chart.x_label,
            chart.y_label,
            chart.series,
            note=chart.note,
            share=chart.share,
            numbers=chart.numbers,
        )
        for written in (path, *([write_png(path)] if png else [])):
            sys.stdout.write(f"wrote {written}\n")


def _title(arguments: argparse.Namespace) -> str:
    names = ", ".join(dict.fromkeys(path.resolve().name for path in arguments.runs))
    return arguments.title or names


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that would have no effect."""
    if arguments.png and not arguments.plots:
        raise ConfigurationError("--png writes beside the SVG files of --plots: give --plots DIR")
    if arguments.png:
        check_png()
    if arguments.port is not None and not arguments.watch:
        raise ConfigurationError("--port is of --watch: give --watch, or leave --port out")
    for name in ("output", "plots"):
        if arguments.watch and getattr(arguments, name):
            raise ConfigurationError(
                f"--{name} has no effect with --watch, which writes no file: give one of them"
            )


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="student-trainer report",
        description="One page without network or scripts: differences between runs, curves, where "
        "the time went, scores with intervals, samples side by side.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="output folder of sft, distill, evaluate or study, or a folder that holds such",
    )
    parser.add_argument("--output", type=Path, help="default: report.html in the first RUN")
    parser.add_argument("--title", help="of the page; default: the names of the folders")
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="write each chart there as an SVG file, for print",
    )
    parser.add_argument(
        "--png",
        action="store_true",
        help="with --plots: as PNG too (needs pip install 'sparse-gkd[png]')",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the page on 127.0.0.1 while the runs train, refreshed every few seconds; no "
        "file is written, and Ctrl-C ends it",
    )
    parser.add_argument("--port", type=int, help="of --watch; default: one that is free")
    return parser


def _lead(found: Found) -> str:
    parts = []
    for count, name in (
        (len(found.training), "training run"),
        (len(found.evaluations), "evaluation"),
        (len(found.studies), "study"),
    ):
        if count:
            plural = {"study": "studies"}.get(name, name + "s")
            parts.append(f"{count} {name if count == 1 else plural}")
    colours = " Each run has one colour and one dash pattern on the whole page; teachers are grey."
    if not parts:
        return ""
    return ", ".join(parts) + ". Intervals are 95 %." + colours * bool(found.training)


def _tables(found: Found) -> dict[str, Table]:
    tables = difference_tables(found)
    if found.training:
        tables["Runs"] = _training_table(found)
    if found.evaluations:
        tables["Evaluations"] = _evaluation_table(found)
    for study in found.studies:
        tables[study.title] = _study_table(study, found.training)
    return tables


def _training_table(found: Found) -> Table:
    """Return a table of where each run ended, without columns that no run fills."""
    wait = "time/stall_fraction"
    columns = {
        "Steps": [_steps(run) for run in found.training],
        "Loss": [_number(run.last("train/loss")) for run in found.training],
        "Divergence": [_number(run.last("train/divergence")) for run in found.training],
        "Held out": [_number(run.last("eval/loss")) for run in found.training],
        "Seconds a step": [_number(run.last("time/step")) for run in found.training],
        "Waiting for teacher": [_percent(run.last(wait)) for run in found.training],
        "Minutes": [_number(_minutes(run)) for run in found.training],
    }
    scores = _own_scores(found)
    filled: dict[str, Sequence[str | Range]] = {
        name: column for name, column in (scores | columns).items() if any(column)
    }
    rows = [
        [run.name, *(column[i] for column in filled.values())]
        for i, run in enumerate(found.training)
    ]
    notes = ["The last values that each run logged."]
    if len(rows) > 1:
        notes.append("Losses can be compared between runs that learn the same.")
    if scores:
        notes.append("Scores are of evaluations, with Wilson's interval over problems.")
    return Table(("Run", *filled), rows, numbers=range(len(rows)), note=" ".join(notes))


def _steps(run: TrainingRun) -> str:
    steps = f"{run.history[-1]['step']:g}" if run.history else "0"
    ended = run.logged is None or run.max_steps is None
    return steps if ended else f"{steps} of {run.max_steps}"


def _own_scores(found: Found) -> dict[str, Any]:
    """Return the scores of each run's own model, metric -> cells of all runs."""
    columns: dict[str, list[str | Range]] = {}
    for evaluation in found.evaluations:
        row = evaluation.place_among(found.training)
        if row is None:
            continue
        for name, score in evaluation.scores.items():
            column = columns.setdefault(name, [""] * len(found.training))
            column[row] = _share(score, evaluation)
    return columns


def _evaluation_table(found: Found) -> Table:
    evaluations = found.evaluations
    names = list(dict.fromkeys(name for one in evaluations for name in one.scores))
    measured = {  # what evaluations measure beside the scores
        "Perplexity": [_number(one.results.get("perplexity")) for one in evaluations],
        "Divergence from teacher": [_number(one.results.get("divergence")) for one in evaluations],
    }
    measured = {name: column for name, column in measured.items() if any(column)}
    rows: list[list[str | Range]] = []
    for i, one in enumerate(evaluations):
        cells = [_share(one.scores[n], one) if n in one.scores else "" for n in names]
        more = [column[i] for column in measured.values()]
        rows.append([one.name, str(one.results["problems"]), str(one.results["n"]), *cells, *more])
    first = [one.scores.get(names[0], -1.0) for one in evaluations] if names else []
    best = max(range(len(first)), key=first.__getitem__) if len(first) > 1 else None
    columns = ("Evaluation", "Problems", "Samples each", *names, *measured)
    numbers = [one.place_among(found.training) for one in evaluations]
    note = (
        "Scores: higher is better, with Wilson's interval over problems. Perplexity and "
        "divergence: lower is better. The row in bold has the highest first score."
    )
    return Table(columns, rows, best, numbers, note)


def _share(score: float, evaluation: Evaluation) -> Range:
    """Return a score with Wilson's interval over problems.

    The interval is too wide where several samples of each problem were drawn.
    """
    return Range(score, *wilson_interval(score, int(evaluation.results["problems"])))


def _study_table(study: StudyRun, runs: Sequence[TrainingRun]) -> Table:
    rows: list[list[str | Range]] = []
    for name, cell in study.cells.items():
        mean, interval = float(cell["mean"]), cell["interval"]
        shown = Range(mean, *interval) if interval else f"{mean:.3f}"
        rows.append([name, str(cell["n"]), shown])
    means = [float(cell["mean"]) for cell in study.cells.values()]
    best = max(range(len(means)), key=means.__getitem__) if len(means) > 1 else None
    places = {run.name: i for i, run in enumerate(runs)}
    numbers = [places.get(name) for name in study.cells]
    note = "Mean over seeds, with Student's t interval over them."
    return Table(("Cell", "Seeds", study.metric), rows, best, numbers, note)


def _number(value: float | None) -> str:
    return "" if value is None else format_number(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _minutes(run: TrainingRun) -> float | None:
    seconds = run.last("train/runtime")
    return None if seconds is None else seconds / 60


def _shaded(runs: Sequence[TrainingRun]) -> list[SideBySide]:
    """Return held-out samples token by token, with the same sample of several runs together."""
    cards: dict[tuple[str, str], SideBySide] = {}
    for number, run in enumerate(runs):
        for sample in run.samples["samples"] if run.samples else ():
            text = "".join(sample["tokens"])
            shaded, completions = {}, {}
            for evaluation in sample["evaluations"]:
                when = f"step {evaluation['step']}"
                if len(runs) > 1:
                    when = f"{run.name}, {when}"
                shaded[f"{_AUTHORS[sample['source']]} at {when}"] = _tokens(sample, evaluation)
                if "completion" in evaluation:
                    completions[f"Student's own at {when}"] = (
                        evaluation["completion"],
                        evaluation["passed"],
                    )
            key = sample["prompt"], text
            earlier = cards.get(key, SideBySide(sample["prompt"], "", {}))
            cards[key] = SideBySide(
                sample["prompt"],
                "",  # the reference is the shaded text
                {**earlier.completions, **completions},
                {**earlier.shaded, **shaded},
                {**earlier.numbers, **dict.fromkeys((*shaded, *completions), number)},
            )
    return list(cards.values())[:_SAMPLES]


def _tokens(sample: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[Token]:
    return [
        Token(text, divergence, [(token, teacher, student) for token, teacher, student in support])
        for text, divergence, support in zip(
            sample["tokens"], evaluation["divergence"], evaluation["support"], strict=True
        )
    ]


def _completions(found: Found) -> list[SideBySide]:
    """Return a few problems of all evaluations, those on which they differ first."""
    evaluations = found.evaluations
    if not evaluations:
        return []
    common = [
        task for task in evaluations[0].samples if all(task in e.samples for e in evaluations)
    ]

    places = {e.name: e.place_among(found.training) for e in evaluations}
    numbers = {name: number for name, number in places.items() if number is not None}

    def verdicts(task: str) -> int:
        return len({e.samples[task]["passed"] for e in evaluations})

    return [
        SideBySide(
            prompt=evaluations[0].samples[task].get("prompt", task),
            reference=evaluations[0].samples[task].get("reference", ""),
            completions={
                e.name: (e.samples[task]["completion"], e.samples[task]["passed"])
                for e in evaluations
            },
            numbers=numbers,
        )
        for task in sorted(common, key=verdicts, reverse=True)[:_SAMPLES]
    ]
