"""Run `student-trainer report`: write a page, and plots, of runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.command_line import OneLineParser
from shared.errors import ConfigurationError
from student_trainer.reporting.page import Chart, Range, Report, SideBySide, Table, Token, render
from student_trainer.reporting.runs import (
    Evaluation,
    Found,
    StudyRun,
    TrainingRun,
    find_runs,
    wilson_interval,
)
from student_trainer.reporting.svg import write_lines

# Title, label of y, and the logged name of each line by its label.
_CURVES: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("Loss", "nats per token", {"loss": "loss"}),
    ("Divergence in training", "nats per token", {"divergence": "divergence"}),
    ("Held-out loss", "nats per token", {"held out": "eval_loss"}),
    ("Held-out pass@1", "share", {"pass@1": "eval_pass@1"}),
    ("Held-out exact match", "share", {"exact match": "eval_exact_match"}),
    (
        "Coverage: mass on the support",
        "probability",
        {"teacher": "teacher_top_k_mass", "student": "student_top_k_mass"},
    ),
    (
        "Entropy over support and tail",
        "nats",
        {"teacher": "teacher_entropy", "student": "student_entropy"},
    ),
    ("Completion length", "tokens", {"length": "completion_length"}),
    ("Completions cut at the limit", "share", {"cut": "truncated"}),
    ("Same most probable token", "share of tokens", {"agreement": "top1_agreement"}),
)
_AUTHORS = {"dataset": "Reference", "teacher": "Teacher's"}
_SAMPLES = 6


def report(argv: Sequence[str]) -> None:
    """Write a page, and plots if they are asked for, of the runs in some folders.

    Raises:
        ConfigurationError: a folder without a run, or one that cannot be written to.
        DatasetError: a file of a run that cannot be read.
    """
    arguments = make_parser().parse(argv)
    found = find_runs(arguments.runs)
    output = arguments.output or arguments.runs[0] / "report.html"
    charts = _charts(found.training)
    page = render(
        Report(
            title=arguments.title
            or ", ".join(dict.fromkeys(path.resolve().name for path in arguments.runs)),
            lead=_lead(found),
            tables=_tables(found),
            charts=charts,
            seconds={run.name: run.seconds() for run in found.training if run.seconds()},
            samples=[*_shaded(found.training), *_completions(found.evaluations)],
        )
    )
    try:
        output.write_text(page, encoding="utf-8")
        sys.stdout.write(f"wrote {output}\n")
        if arguments.plots:
            arguments.plots.mkdir(parents=True, exist_ok=True)
            for chart in charts:
                name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
                path = arguments.plots / f"{name}.svg"
                write_lines(path, chart.title, chart.x_label, chart.y_label, chart.series)
                sys.stdout.write(f"wrote {path}\n")
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}") from error


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="student-trainer report",
        description="One page without network or scripts: curves, where the time went, scores with "
        "intervals, samples side by side.",
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
        help="write each chart there as an SVG file, for print (no library that is installed with "
        "the trainer draws PNG)",
    )
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
    return ", ".join(parts) + ". Intervals are 95 %."


def _charts(runs: Sequence[TrainingRun]) -> list[Chart]:
    """Return the charts: one run's lines of a figure together, of several runs a chart a line."""
    charts = []
    for title, y_label, lines in _CURVES:
        if len(runs) == 1:
            series = {label: runs[0].points(key) for label, key in lines.items()}
            charts.append(Chart(title, y_label, series))
            continue
        for label, key in lines.items():
            # Runs without this line stay in, so that each run keeps its colour in all charts.
            series = {run.name: run.points(key) for run in runs}
            name = f"{title}, {label}" if len(lines) > 1 else title
            charts.append(Chart(name, y_label, series))
    return [chart for chart in charts if any(chart.series.values())]


def _tables(found: Found) -> dict[str, Table]:
    tables = {}
    if found.training:
        tables["Runs"] = _training_table(found)
    if found.evaluations:
        tables["Evaluations"] = _evaluation_table(found.evaluations)
    for study in found.studies:
        tables[study.title] = _study_table(study)
    return tables


def _training_table(found: Found) -> Table:
    """Return a table of where each run ended, without columns that no run fills."""
    columns = {
        "Steps": [f"{run.history[-1]['step']:g}" if run.history else "" for run in found.training],
        "Loss": [_number(run.last("loss")) for run in found.training],
        "Divergence": [_number(run.last("divergence")) for run in found.training],
        "Held out": [_number(run.last("eval_loss")) for run in found.training],
        "Seconds a step": [_number(run.last("seconds_step")) for run in found.training],
        "Waiting for teacher": [_percent(run.last("stall_fraction")) for run in found.training],
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
    return Table(("Run", *filled), rows)


def _own_scores(found: Found) -> dict[str, Any]:
    """Return the scores of each run's own model, metric -> cells of all runs."""
    columns: dict[str, list[str | Range]] = {}
    for row, run in enumerate(found.training):
        for evaluation in found.evaluations:
            for name, score in evaluation.scores.items() if evaluation.of(run) else ():
                column = columns.setdefault(name, [""] * len(found.training))
                column[row] = _share(score, evaluation)
    return columns


def _evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
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
    return Table(("Evaluation", "Problems", "Samples each", *names, *measured), rows, best)


def _share(score: float, evaluation: Evaluation) -> Range:
    """Return a score with Wilson's interval over problems.

    The interval is too wide where several samples of each problem were drawn.
    """
    return Range(score, *wilson_interval(score, int(evaluation.results["problems"])))


def _study_table(study: StudyRun) -> Table:
    rows: list[list[str | Range]] = []
    for name, cell in study.cells.items():
        mean, interval = float(cell["mean"]), cell["interval"]
        shown = Range(mean, *interval) if interval else f"{mean:.3f}"
        rows.append([name, str(cell["n"]), shown])
    means = [float(cell["mean"]) for cell in study.cells.values()]
    best = max(range(len(means)), key=means.__getitem__) if len(means) > 1 else None
    return Table(("Cell", "Seeds", study.metric), rows, best)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _minutes(run: TrainingRun) -> float | None:
    seconds = run.last("train_runtime")
    return None if seconds is None else seconds / 60


def _shaded(runs: Sequence[TrainingRun]) -> list[SideBySide]:
    """Return held-out samples token by token, with the same sample of several runs together."""
    cards: dict[tuple[str, str], SideBySide] = {}
    for run in runs:
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
            )
    return list(cards.values())[:_SAMPLES]


def _tokens(sample: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[Token]:
    return [
        Token(text, divergence, [(token, teacher, student) for token, teacher, student in support])
        for text, divergence, support in zip(
            sample["tokens"], evaluation["divergence"], evaluation["support"], strict=True
        )
    ]


def _completions(evaluations: Sequence[Evaluation]) -> list[SideBySide]:
    """Return a few problems of all evaluations, those on which they differ first."""
    if not evaluations:
        return []
    common = [
        task for task in evaluations[0].samples if all(task in e.samples for e in evaluations)
    ]

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
        )
        for task in sorted(common, key=verdicts, reverse=True)[:_SAMPLES]
    ]
