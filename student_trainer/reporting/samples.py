"""Choose the samples that a report shows, and say how they were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from student_trainer.reporting.content import Samples, SideBySide, Token
from student_trainer.reporting.runs import Evaluation, Found, TrainingRun

T = TypeVar("T")

_AUTHORS = {"dataset": "Reference", "teacher": "Teacher's"}
_SAMPLES = 6


def samples_of(found: Found) -> list[Samples]:
    """Return held-out samples token by token, then completions of evaluations."""
    held_out, completions = _held_out(found.training), _completions(found)
    return [samples for samples in (held_out, completions) if samples is not None]


def _held_out(runs: Sequence[TrainingRun]) -> Samples | None:
    cards = _shaded(runs)
    if not cards:
        return None
    of = {run.samples.get("rows") for run in runs if run.samples}
    known = of.pop() if len(of) == 1 else None
    chosen = (
        f"{len(cards)} of {known} held-out rows, evenly spaced in their order"
        if known
        else f"{len(cards)} of the held-out rows, by their place in the file"
    )
    note = (
        f"{chosen} and not chosen by result: each at the first evaluation of a run and at its "
        "latest. Where rows have a checker, the student's own answer says whether it passes."
    )
    return Samples("Held-out samples, token by token", note, cards)


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
    return evenly(list(cards.values()), _SAMPLES)


def _tokens(sample: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[Token]:
    return [
        Token(text, divergence, [(token, teacher, student) for token, teacher, student in support])
        for text, divergence, support in zip(
            sample["tokens"], evaluation["divergence"], evaluation["support"], strict=True
        )
    ]


def _completions(found: Found) -> Samples | None:
    """Return a few of the problems that all evaluations share, with what each model wrote."""
    evaluations = found.evaluations
    common = [
        task
        for task in (evaluations[0].samples if evaluations else ())
        if all(task in e.samples for e in evaluations)
    ]
    if not common:
        return None
    chosen = evenly(common, _SAMPLES)
    evaluations = sorted(evaluations, key=lambda e: not _before(e, found.training))  # first
    names = {
        e.name: f"{e.name}, before training" if _before(e, found.training) else e.name
        for e in evaluations
    }
    places = {names[e.name]: e.place_among(found.training) for e in evaluations}
    numbers = {name: number for name, number in places.items() if number is not None}
    verdicts = {
        names[e.name]: {task: bool(e.samples[task]["passed"]) for task in common}
        for e in evaluations
    }
    cards = [
        SideBySide(
            prompt=evaluations[0].samples[task].get("prompt", task),
            reference=evaluations[0].samples[task].get("reference", ""),
            completions={
                names[e.name]: (e.samples[task]["completion"], e.samples[task]["passed"])
                for e in evaluations
            },
            numbers=numbers,
        )
        for task in chosen
    ]
    return Samples("Completions side by side", how_chosen(chosen, verdicts), cards)


def _before(evaluation: Evaluation, runs: Sequence[TrainingRun]) -> bool:
    """Return whether a run began with the model of an evaluation."""
    model = str(evaluation.results.get("model", ""))
    return any(run.inputs.get("--model_name_or_path") == model for run in runs)


def how_chosen(chosen: Sequence[Any], verdicts: Mapping[str, Mapping[Any, bool]]) -> str:
    """Return how problems were chosen, and how far they speak for all of them.

    Args:
        verdicts: name of a model -> problem -> right or wrong, of all problems.
    """
    count = max((len(passed) for passed in verdicts.values()), default=0)
    said = []
    for name, passed in verdicts.items():
        shown = sum(passed[task] for task in chosen)
        said.append(f"{name} {shown} of {len(chosen)} here, {sum(passed.values())} of all {count}")
    if len(chosen) == count:
        return f"All {count} problems. They pass: " + "; ".join(said) + "."
    return (
        f"{len(chosen)} of {count} problems, evenly spaced in their order and not chosen by "
        f"result, so they may look better or worse than the whole. They pass: {'; '.join(said)}."
    )


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items, evenly spaced from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
