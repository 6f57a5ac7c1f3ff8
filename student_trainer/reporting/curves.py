"""The charts of training runs: what each shows, and what is good in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from student_trainer.reporting.content import Better, Chart
from student_trainer.reporting.runs import TrainingRun
from student_trainer.reporting.svg import TEACHER, Point


@dataclass(frozen=True)
class Curve:
    """A quantity that runs log.

    Attributes:
        lines: label -> the logged name. A label "teacher" is drawn as the teacher's.
        words: what it is, in one or two sentences.
        note: one or two sentences on what to do where it is not good.
        better: the direction that is good, "" where neither is.
        share: it is a share, written in percent.
        compared: a difference between the last values of two runs says something.
        whole: it is drawn of all teachers together too, not only of each.
        same_as: the logged divergence that has a chart of its own. Where a run learns nothing
            else, its loss is not drawn again.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    words: str
    note: str = ""
    better: Better = ""
    share: bool = False
    compared: bool = True
    whole: bool = True
    same_as: str = ""


CURVES = (
    Curve(
        "Held-out divergence",
        "nats per token",
        {"held out": "eval/divergence"},
        "How far student and teacher are apart on rows that are not trained on.",
        "Rising while it falls in training is overfitting: stop there, or add prompts.",
        "lower",
    ),
    Curve(
        "Held-out loss",
        "nats per token",
        {"held-out loss": "eval/loss"},
        "The cross-entropy on rows that are not trained on; with a teacher, the divergence.",
        "Rising while the loss in training falls is overfitting: stop there, or add prompts.",
        "lower",
        same_as="eval/divergence",
    ),
    Curve(
        "Held-out pass@1",
        "share of problems",
        {"pass@1": "eval/pass@1"},
        "Held-out problems that the student's own answer passes.",
        "A few problems more or less are chance.",
        "higher",
        share=True,
    ),
    Curve(
        "Held-out exact match",
        "share of rows",
        {"exact match": "eval/exact_match"},
        "Held-out rows that the student answers exactly.",
        "A few rows more or less are chance.",
        "higher",
        share=True,
    ),
    Curve(
        "Divergence in training",
        "nats per token",
        {"training": "train/divergence"},
        "How far student and teacher are apart on the completions that are learned; at 0 the "
        "student is its teacher.",
        "Flat for some hundred steps means that more of them bring little: try a higher learning "
        "rate, or a larger student.",
        "lower",
    ),
    Curve(
        "Loss",
        "nats per token",
        {"loss": "train/loss"},
        "What is minimised: without a teacher the cross-entropy, with one the divergence and "
        "--sft_weight's part.",
        "Only runs that learn the same can be compared.",
        "lower",
        compared=False,
        same_as="train/divergence",
    ),
    Curve(
        "Same most probable token",
        "share of tokens",
        {"agreement": "train/top1_agreement"},
        "At 100 % student and teacher write the same where the most probable token is taken.",
        "",
        "higher",
        share=True,
    ),
    Curve(
        "Coverage: mass on the support",
        "probability",
        {"teacher": "teacher/top_k_mass", "student": "train/student_top_k_mass"},
        "The support is the tokens whose probability the teacher sends at a position, its k most "
        "probable; the tail is all others as one.",
        "A teacher's below about 95 % leaves much to the tail: raise --top_k_logprobs. A student "
        "far below its teacher writes what the teacher would not.",
        "higher",
        share=True,
        compared=False,
    ),
    Curve(
        "Entropy over support and tail",
        "nats",
        {"teacher": "teacher/entropy", "student": "train/student_entropy"},
        "How undecided each is about the next token. Close together is good.",
        "A student far below its teacher has collapsed onto few continuations; one far above has "
        "not learned yet.",
        compared=False,
    ),
    Curve(
        "Completion length",
        "tokens",
        {"length": "train/completion_length"},
        "Neither direction is good in itself.",
        "Growing to --max_new_tokens, or falling towards 0, means that the student has lost its "
        "end of text.",
        compared=False,
    ),
    Curve(
        "Completions cut at the limit",
        "share of completions",
        {"cut": "train/truncated"},
        "What is cut teaches no end.",
        "Much above 10 %: raise --max_new_tokens.",
        "lower",
        share=True,
    ),
    Curve(
        "Staleness of completions",
        "updates",
        {"mean": "train/staleness", "largest": "train/staleness_max"},
        "By how many updates the weights that wrote a completion are older than those that learn "
        "it; 0 is exactly on-policy.",
        "It is at most --rollout_staleness.",
        "lower",
        compared=False,
    ),
    Curve(
        "Context divergence",
        "nats per token",
        {"context": "eval/context_divergence"},
        "How much the teacher's own prompt, which the student does not see, changes what the "
        "teacher expects: its divergence to itself with the student's prompt, on held-out rows. "
        "It does not depend on the student.",
        "Near 0 that prompt tells the teacher nothing: look at the prompt first.",
        compared=False,
    ),
    Curve(
        "Waiting for each teacher",
        "seconds a step",
        {"waiting": "time/teacher"},
        "Seconds of a step in which the answer of that teacher was waited for.",
        "If one stands out, give it more replicas.",
        "lower",
        compared=False,
        whole=False,
    ),
    Curve(
        "Tokens that each teacher scored",
        "tokens a second",
        {"scored": "teacher/tokens_per_second"},
        "Completion tokens of that teacher's rows, a second; fewer where it has fewer rows.",
        compared=False,
        whole=False,
    ),
)


_DASHED = {"largest": 6}  # a second line of a run: its colour, in other dashes


def charts_of(runs: Sequence[TrainingRun]) -> list[Chart]:
    """Return the charts: one run's lines of a figure together, of several runs a chart a line.

    A run has the colour of its place among the runs in all of them; each of its named teachers has
    one of the next.
    """
    charts = []
    for curve in CURVES:
        if len(runs) == 1:
            charts.append(_of_one(curve, runs[0]))
            continue
        numbers = {run.name: number for number, run in enumerate(runs)}
        for label, key in curve.lines.items():
            title = f"{curve.title}, {label}" if len(curve.lines) > 1 else curve.title
            for kind, alike in _alike(runs, curve).items() if curve.whole else ():
                series = {run.name: _points(curve, run, key) for run in alike}
                chart = _chart(curve, title + kind, series, numbers)
                if not (charts and chart.series == charts[-1].series):  # mean and largest are alike
                    charts.append(chart)
            names = dict.fromkeys(name for run in runs for name in _taught(run, key))
            for name in names:
                series = {run.name: run.points(f"{key}/{name}") for run in runs}
                charts.append(_chart(curve, f"{title}, teacher {name}", series, numbers))
    return [chart for chart in charts if any(chart.series.values())]


def _of_one(curve: Curve, run: TrainingRun) -> Chart:
    """Return the chart of a run: all together, and a line for each of several teachers."""
    series, numbers = {}, {}
    places = {name: 1 + place for place, name in enumerate(_teachers(run))}
    for label, key in curve.lines.items():
        taught = _taught(run, key)
        if curve.whole:
            shown = label
            if taught:
                shown = "all teachers" if label == "teacher" else f"{label}, all rows"
            series[shown] = _points(curve, run, key)
            numbers[shown] = TEACHER if label == "teacher" else _DASHED.get(label, 0)
        for name in taught:
            series[name] = run.points(f"{key}/{name}")
            numbers[name] = places[name]
    return _chart(curve, curve.title, series, numbers)


def _teachers(run: TrainingRun) -> list[str]:
    """Return the names of a run's teachers, in the order of its flags where that is known."""
    keys = [key for curve in CURVES for key in curve.lines.values()]
    return list(dict.fromkeys(name for key in keys for name in _taught(run, key)))


def _taught(run: TrainingRun, key: str) -> list[str]:
    """Return the teachers that a quantity is logged for, where they are several."""
    logged = run.names()
    names = {name.removeprefix(f"{key}/") for name in logged if name.startswith(f"{key}/")}
    order = dict.fromkeys([*run.teachers(), *sorted(names)])
    return [name for name in order if name in names] if len(names) > 1 else []


def _points(curve: Curve, run: TrainingRun, key: str) -> list[Point]:
    """Return the points under a name; none where another chart has the same."""
    if curve.same_as and run.last(curve.same_as) is not None and run.learns_divergence_alone():
        return []
    return run.points(key)


def _alike(runs: Sequence[TrainingRun], curve: Curve) -> dict[str, Sequence[TrainingRun]]:
    """Return the runs that share a chart; losses with and without a teacher are two quantities."""
    taught = [run.last("train/divergence") is not None for run in runs]
    if not (curve.same_as and any(taught) and not all(taught)):
        return {"": runs}
    pairs = list(zip(runs, taught, strict=True))
    return {
        " with a teacher": [run for run, with_teacher in pairs if with_teacher],
        " without a teacher": [run for run, with_teacher in pairs if not with_teacher],
    }


def _chart(
    curve: Curve, title: str, series: Mapping[str, Sequence[Point]], numbers: Mapping[str, int]
) -> Chart:
    return Chart(
        title,
        curve.unit,
        {name: line for name, line in series.items() if line},
        words=curve.words,
        note=curve.note,
        better=curve.better,
        share=curve.share,
        numbers=numbers,
    )
