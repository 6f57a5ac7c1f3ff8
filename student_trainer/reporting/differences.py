"""The differences between runs, with 95 % intervals where there is something to take them over."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from student_trainer.reporting.axes import format_number
from student_trainer.reporting.content import Cell, Delta, Table, Verdict
from student_trainer.reporting.curves import CURVES
from student_trainer.reporting.runs import Evaluation, Found, StudyRun, TrainingRun
from student_trainer.reporting.statistics import Estimate, paired_difference

_NOTE = (
    "Intervals are 95 %; the bar shows one against 0, green where it is better, red where it is "
    "worse. One that holds 0 may be chance. Each is of one comparison: among twenty, one is "
    "expected to miss."
)
_ONE_SEED = (
    "Of one run each nothing tells how a run repeats: another seed may change any of these "
    "differences. student-trainer study runs several seeds and makes intervals over them."
)
_NO_INTERVAL = "No interval can be made here: each row is of one number on either side."


@dataclass(frozen=True)
class Model:
    """A training run with the evaluation of its model, or one of them alone.

    Attributes:
        number: of the run's colour; None where it is an evaluation alone.
    """

    name: str
    number: int | None
    run: TrainingRun | None
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Difference:
    """A metric of two models, and the first minus the second.

    Attributes:
        share: it is a share, written in percent.
        found: the paired difference with its interval; None where it is of two numbers alone.
        over: what the interval is over, or why there is none.
    """

    metric: str
    value: float
    base: float
    share: bool
    found: Estimate | None
    over: str

    @property
    def has_interval(self) -> bool:
        return self.found is not None and bool(self.found.margin)


def models_of(found: Found) -> list[Model]:
    """Return the training runs with their evaluations, then the evaluations of other models."""
    models = []
    places = [one.place_among(found.training) for one in found.evaluations]
    for number, run in enumerate(found.training):
        pairs = zip(found.evaluations, places, strict=True)
        own = [one for one, place in pairs if place == number]
        models.append(Model(run.name, number, run, own[0] if own else None))
    taken = [model.evaluation for model in models]
    others = [one for one in found.evaluations if not any(one is other for other in taken)]
    return [*models, *(Model(one.name, None, None, one) for one in others)]


def difference_tables(found: Found) -> dict[str, Table]:
    """Return a table of all models against the first, and one a study, of the pairs it compares.

    There is none where there is nothing to compare.
    """
    tables = {}
    models = [model for model in models_of(found) if not (model.run and model.run.seeds)]
    rows = [(other, row) for other in models[1:] for row in differences(other, models[0])]
    if rows:
        tables[f"Differences from {models[0].name}"] = _table(rows, models[0])
    cells = {run.name: run for run in found.training if run.seeds}
    for study in found.studies:
        if study.differences:
            tables[f"{study.title}: differences"] = _study_table(study, cells)
    return tables


def differences(model: Model, base: Model) -> Iterator[Difference]:
    """Yield the differences of what both have measured, those with intervals first."""
    if model.evaluation and base.evaluation:
        yield from _scores(model.evaluation, base.evaluation)
    if model.run and base.run:
        yield from _samples(model.run, base.run)
        yield from _last_values(model.run, base.run)


def _scores(one: Evaluation, base: Evaluation) -> Iterator[Difference]:
    same = bool(one.passed) and one.passed.keys() == base.passed.keys()
    for name, score in one.scores.items():
        if name not in base.scores:
            continue
        if same and name in ("pass@1", "exact_match", "final_number"):
            found = paired_difference(one.passed, base.passed)
            over = _over(found, "problems", "one problem")
        else:
            found, over = None, "none" if same else "none: not the same problems"
        yield Difference(name, score, base.scores[name], True, found, over)
    for name, title in (("perplexity", "Perplexity"), ("divergence", "Divergence from teacher")):
        if same and name in one.results and name in base.results:
            value, other = float(one.results[name]), float(base.results[name])
            yield Difference(title, value, other, False, None, "none: one mean over all tokens")


def _samples(run: TrainingRun, base: TrainingRun) -> Iterator[Difference]:
    """Yield the difference of divergence on the held-out samples that both show, after training."""
    if not (run.samples and base.samples and _same_divergence(run, base)):
        return
    last, other = _sample_divergences(run.samples), _sample_divergences(base.samples)
    found = paired_difference(last, other)
    if found is not None:
        common = last.keys() & other.keys()
        value, reference = (statistics.fmean(m[key] for key in common) for m in (last, other))
        over = _over(found, "held-out samples", "a single sample")
        yield Difference("Divergence on shown samples", value, reference, False, found, over)


def _sample_divergences(samples: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Return the mean divergence of each sample at its last evaluation, by prompt and text."""
    return {
        (sample["prompt"], "".join(sample["tokens"])): statistics.fmean(divergence)
        for sample in samples["samples"]
        if (divergence := sample["evaluations"][-1]["divergence"])
    }


def _same_divergence(run: TrainingRun, base: TrainingRun) -> bool:
    """Return whether both learn one divergence, or whether that is unknown."""
    if (run.last("train/divergence") is None) != (base.last("train/divergence") is None):
        return False
    return not (run.divergence and base.divergence) or run.divergence == base.divergence


def _last_values(run: TrainingRun, base: TrainingRun) -> Iterator[Difference]:
    same = _same_divergence(run, base)
    for title, key, share in _LAST:
        value, other = run.last(key), base.last(key)
        if (
            value is None
            or other is None
            or (key == "eval/loss" and run.last("eval/divergence") is not None)  # the same number
            or (key in ("train/divergence", "eval/divergence", "eval/loss") and not same)
        ):
            continue
        found = paired_difference(run.last_of_seeds(key), base.last_of_seeds(key))
        over = _over(found, "seeds", "one run each")
        yield Difference(title, value, other, share, found, over)


# Title, logged name, and whether it is a share, of what is compared at the end of training.
_LAST = (
    *(
        (curve.title, key, curve.share)
        for curve in CURVES
        if curve.compared
        for key in curve.lines.values()
    ),
    ("Seconds a step", "time/step", False),
    ("Waiting for the teacher", "time/stall_fraction", True),
)


def _over(found: Estimate | None, things: str, otherwise: str) -> str:
    """Return what an interval is over, or why there is none."""
    if found is None or found.n == 1:
        return f"none: {otherwise}"
    return f"{found.n} {things}, paired" if found.margin else f"none: the same in all {things}"


_COLUMNS = ("Difference", "95 % interval", "Interval over")


def _table(rows: Sequence[tuple[Model, Difference]], base: Model) -> Table:
    rows = sorted(rows, key=lambda row: not row[1].has_interval)  # stable: else in their order
    note = " ".join([_note([row for _, row in rows]), _ONE_SEED])
    names = list(dict.fromkeys(model.name for model, _ in rows))
    if len(names) == 1:
        columns = ("Metric", base.name, names[0], *_COLUMNS)
        return Table(columns, [[_titled(r.metric), *_cells(r)] for _, r in rows], note=note)
    body = [[_titled(row.metric), model.name, *_cells(row)] for model, row in rows]
    order = list(dict.fromkeys(row.metric for _, row in rows))
    places = [order.index(row.metric) for _, row in rows]
    body = [cells for _, cells in sorted(zip(places, body, strict=True), key=lambda pair: pair[0])]
    return Table(("Metric", "Run", base.name, "This run", *_COLUMNS), body, note=note)


def _note(rows: Sequence[Difference]) -> str:
    return _NOTE if any(row.has_interval for row in rows) else _NO_INTERVAL


def _study_table(study: StudyRun, cells: Mapping[str, TrainingRun]) -> Table:
    share = study.metric.startswith("pass@") or study.metric in ("exact_match", "final_number")
    body, found_all = [], []
    for pair in study.differences:
        cell, base = pair["cell"], pair["base"]
        interval = pair["interval"]
        margin = (interval[1] - interval[0]) / 2 if interval else None
        found = Estimate(float(pair["mean"]), margin, int(pair["n"]))
        value, other = (float(study.cells[name]["mean"]) for name in (cell, base))
        over = _over(found, "seeds", "one seed")
        rows = [Difference(study.metric, value, other, share, found, over)]
        if cell in cells and base in cells:
            rows += _last_values(cells[cell], cells[base])
        rows.sort(key=lambda row: not row.has_interval)
        body += [[f"{cell} − {base}", _titled(row.metric), *_cells(row)] for row in rows]
        found_all += rows
    note = _note(found_all)
    return Table(("Cell − base", "Metric", "Base", "Cell", *_COLUMNS), body, note=note)


_LOWER = {
    "Perplexity", "Divergence from teacher", "Divergence on shown samples", "Seconds a step",
    "Waiting for the teacher", *(curve.title for curve in CURVES if curve.better == "lower"),
}  # fmt: skip


def _titled(metric: str) -> str:
    return f"{metric} ({'lower' if metric in _LOWER else 'higher'} is better)"


def _cells(row: Difference) -> tuple[Cell, ...]:
    """Return both values, difference, interval, and what it is over; shares differ by points."""

    def signed(value: float) -> str:
        size = f"{abs(100 * value):.1f}" if row.share else format_number(abs(value))
        return ("−" if value < 0 else "+") + size

    difference = row.value - row.base if row.found is None else row.found.mean
    points = "\u00a0points" if row.share else ""
    interval: Cell = "–"
    if row.found is not None and row.found.margin:
        low, high = difference - row.found.margin, difference + row.found.margin
        if row.share:
            low, high = max(low, -1.0), min(high, 1.0)
        better = (difference < 0) == (row.metric in _LOWER)
        verdict: Verdict = "better" if better else "worse"
        chance = ""
        if row.found.covers_zero():
            verdict, chance = "chance", ", may be chance"
        interval = Delta(f"{signed(low)} to {signed(high)}{points}{chance}", low, high, verdict)
    values = [format_number(value, share=row.share) for value in (row.base, row.value)]
    return values[0], values[1], signed(difference) + points, interval, row.over
