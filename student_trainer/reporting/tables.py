"""The tables of a report: differences, runs, evaluations and studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from student_trainer.reporting.axes import format_number
from student_trainer.reporting.content import Cell, Range, Table
from student_trainer.reporting.differences import difference_tables
from student_trainer.reporting.runs import Evaluation, Found, StudyRun, TrainingRun
from student_trainer.reporting.statistics import wilson_interval


def tables_of(found: Found) -> dict[str, Table]:
    """Return the tables of the page by title, differences first."""
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
        "Loss": [_number(_own_loss(run)) for run in found.training],
        "Divergence": [_number(run.last("train/divergence")) for run in found.training],
        "Held-out loss": [_number(_own_held_out_loss(run)) for run in found.training],
        "Held-out divergence": [_number(run.last("eval/divergence")) for run in found.training],
        "Seconds a step": [_number(run.last("time/step")) for run in found.training],
        "Waiting for teacher": [_percent(run.last(wait)) for run in found.training],
        "Minutes": [_number(_minutes(run)) for run in found.training],
    }
    scores = _own_scores(found)
    filled: dict[str, Sequence[Cell]] = {
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


def _own_loss(run: TrainingRun) -> float | None:
    """Return the last loss, where it is not the divergence."""
    return None if run.learns_divergence_alone() else run.last("train/loss")


def _own_held_out_loss(run: TrainingRun) -> float | None:
    return None if run.last("eval/divergence") is not None else run.last("eval/loss")


def _steps(run: TrainingRun) -> str:
    steps = f"{run.history[-1]['step']:g}" if run.history else "0"
    ended = run.logged is None or run.max_steps is None
    return steps if ended else f"{steps} of {run.max_steps}"


def _own_scores(found: Found) -> dict[str, Any]:
    """Return the scores of each run's own model, metric -> cells of all runs."""
    columns: dict[str, list[Cell]] = {}
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
    rows: list[list[Cell]] = []
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
    rows: list[list[Cell]] = []
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
