"""The charts of training runs: what each shows, and what is good in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from student_trainer.reporting.page import Chart
from student_trainer.reporting.runs import TrainingRun
from student_trainer.reporting.svg import TEACHER

Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Curve:
    """A quantity that runs log.

    Attributes:
        lines: label -> the logged name. A label "teacher" is drawn as the teacher's.
        note: one or two sentences on what is good.
        better: the direction that is good, "" where neither is.
        share: it is a share, drawn from 0 to 100 %.
        compared: a difference between the last values of two runs says something.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    note: str
    better: Better = ""
    share: bool = False
    compared: bool = True


CURVES = (
    Curve(
        "Loss",
        "nats per token",
        {"loss": "train/loss"},
        "Lower is better. Only runs that learn the same can be compared: without a teacher it is "
        "the cross-entropy, with one the divergence (and --sft_weight's part).",
        "lower",
        compared=False,
    ),
    Curve(
        "Divergence in training",
        "nats per token",
        {"divergence": "train/divergence"},
        "Lower is better; at 0 the student is its teacher. Flat for some hundred steps means that "
        "more of them bring little: try a higher learning rate, or a larger student.",
        "lower",
    ),
    Curve(
        "Held-out loss",
        "nats per token",
        {"held-out loss": "eval/loss"},
        "Lower is better. Rising while the loss in training falls is overfitting: stop there, or "
        "add prompts.",
        "lower",
    ),
    Curve(
        "Held-out pass@1",
        "share of problems",
        {"pass@1": "eval/pass@1"},
        "Higher is better. A few problems more or less are chance.",
        "higher",
        share=True,
    ),
    Curve(
        "Held-out exact match",
        "share of rows",
        {"exact match": "eval/exact_match"},
        "Higher is better. A few rows more or less are chance.",
        "higher",
        share=True,
    ),
    Curve(
        "Coverage: mass on the support",
        "probability",
        {"teacher": "teacher/top_k_mass", "student": "train/student_top_k_mass"},
        "Higher is better. A teacher's below about 95 % leaves much to the tail: raise "
        "--top_k_logprobs. A student's far below its teacher's writes what the teacher would not.",
        "higher",
        share=True,
        compared=False,
    ),
    Curve(
        "Entropy over support and tail",
        "nats",
        {"teacher": "teacher/entropy", "student": "train/student_entropy"},
        "Close together is good. A student far below its teacher has collapsed onto few "
        "continuations; one far above has not learned yet.",
        compared=False,
    ),
    Curve(
        "Completion length",
        "tokens",
        {"length": "train/completion_length"},
        "Neither direction is good in itself. Growing to --max_new_tokens, or falling towards 0, "
        "means that the student has lost its end of text.",
        compared=False,
    ),
    Curve(
        "Completions cut at the limit",
        "share of completions",
        {"cut": "train/truncated"},
        "Lower is better: what is cut teaches no end. Much above 10 %: raise --max_new_tokens.",
        "lower",
        share=True,
    ),
    Curve(
        "Same most probable token",
        "share of tokens",
        {"agreement": "train/top1_agreement"},
        "Higher is better; at 100 % both write the same where the most probable token is taken.",
        "higher",
        share=True,
    ),
)


_LOSSES = ("Loss", "Held-out loss")


def charts_of(runs: Sequence[TrainingRun]) -> list[Chart]:
    """Return the charts: one run's lines of a figure together, of several runs a chart a line.

    A run has the colour of its place among the runs in all of them.
    """
    charts = []
    logged = {name for entry in runs[0].history for name in entry} if len(runs) == 1 else set()
    for curve in CURVES:
        if len(runs) == 1:
            series = {label: runs[0].points(key) for label, key in curve.lines.items()}
            numbers = {label: TEACHER if label == "teacher" else 0 for label in series}
            charts.append(_chart(curve, curve.title, series, numbers))
            charts += _by_teacher(curve, runs[0], logged)
            continue
        numbers = {run.name: number for number, run in enumerate(runs)}
        for label, key in curve.lines.items():
            title = f"{curve.title}, {label}" if len(curve.lines) > 1 else curve.title
            for kind, alike in _alike(runs, curve).items():
                series = {run.name: run.points(key) for run in alike}
                charts.append(_chart(curve, title + kind, series, numbers))
    return [chart for chart in charts if any(chart.series.values())]


def _by_teacher(curve: Curve, run: TrainingRun, logged: Set[str]) -> list[Chart]:
    """Return charts of a figure for each of several teachers, where the run has it for them.

    Args:
        logged: all names of the run's log.
    """
    charts = []
    for label, key in curve.lines.items():
        own = sorted(name for name in logged if name.startswith(f"{key}/"))
        if not own:
            continue
        series = {name.removeprefix(f"{key}/"): run.points(name) for name in own}
        title = f"{curve.title}, {label} by teacher" if len(curve.lines) > 1 else ""
        numbers = {name: number for number, name in enumerate(series)}
        charts.append(_chart(curve, title or f"{curve.title}, by teacher", series, numbers))
    return charts


def _alike(runs: Sequence[TrainingRun], curve: Curve) -> dict[str, Sequence[TrainingRun]]:
    """Return the runs that share a chart; losses with and without a teacher are two quantities."""
    taught = [run for run in runs if run.points("train/divergence")]
    others = [run for run in runs if run not in taught]
    if not (curve.title in _LOSSES and taught and others):
        return {"": runs}
    return {" with a teacher": taught, " without a teacher": others}


def _chart(
    curve: Curve,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    numbers: Mapping[str, int],
) -> Chart:
    return Chart(title, curve.unit, series, note=curve.note, share=curve.share, numbers=numbers)
