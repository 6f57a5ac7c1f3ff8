"""Say what was trained, from which teacher and on what, and what to look at first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from student_trainer.reporting.runs import Found, TrainingRun

_MOST_FLAGS = 6  # that several runs differ in and that are named


def introduction(found: Found, *, compared: bool) -> list[str]:
    """Return a few sentences for whoever has not seen these runs: what they are, where to begin.

    Args:
        compared: the page has differences.
    """
    runs = found.training
    stories: dict[str, list[str]] = {}
    for run in runs:
        if run.inputs:
            stories.setdefault(_story(run), []).append(run.name)
    told = [
        f"{_listed(names) if len(runs) > 1 else names[0]}: {story}"
        for story, names in stories.items()
    ]
    if not told:
        told = [_counts(found)]
    flags = _different_flags(runs)
    if flags:
        told.append(flags)
    first = _look_first(found, compared=compared)
    return [text for text in (*told, first) if text]


def how_to_read(found: Found) -> str:
    """Return what holds for the whole page."""
    if not found.training:
        return "Intervals are 95 %." if found.evaluations or found.studies else ""
    colours = " Each run has one colour and one dash pattern on the whole page; teachers are grey"
    named = any(len(run.teachers()) > 1 for run in found.training) and len(found.training) == 1
    return (
        f"Intervals are 95 %.{colours}{', named ones each of one colour' if named else ''}. "
        "A nat is the natural unit of information, 1.44 bits."
    )


def _story(run: TrainingRun) -> str:
    inputs = run.inputs
    model = _quoted(inputs.get("--model_name_or_path", "a model"))
    peft = inputs.get("--use_peft")
    trained = f"LoRA adapters of student {model} were" if peft else f"student {model} was"
    data = inputs.get("--dataset_name") or []
    rows = _listed([_quoted(name) for name in ([data] if isinstance(data, str) else data)])
    on = f" on {rows}" if rows else ""
    return f"{trained} trained by {_method(inputs)}{_from(run)}{on}{_length(run)}."


def _method(inputs: Any) -> str:
    lmbda = inputs.get("--lmbda")
    if lmbda is None:
        return "supervised fine-tuning (SFT)"
    fixed = "SeqKD (the teacher writes)" if inputs.get("--seq_kd") else "supervised KD"
    if lmbda == 0:
        return fixed
    if lmbda == 1:
        return "on-policy GKD (the student writes, the teacher scores)"
    return f"a mixture, {100 * lmbda:g} % on-policy GKD and the rest {fixed}"


def _from(run: TrainingRun) -> str:
    teachers = {name: _quoted(model) for name, model in run.teachers().items()}
    if not teachers:
        return ""
    if len(teachers) == 1:
        return f" from the teacher {next(iter(teachers.values()))}"
    named = [
        name if model == f"“{name}”" else f"{name} ({model})"
        for name, model in teachers.items()
        if name
    ]
    return f" from {len(named)} teachers, {_listed(named)}, each for its own rows,"


def _length(run: TrainingRun) -> str:
    steps, rows = run.max_steps, run.inputs.get("rows a step")
    if not steps:
        return ""
    return f", for {steps:,} steps" + (f" of {rows} rows" if rows else "")


def _different_flags(runs: Sequence[TrainingRun]) -> str:
    """Return in which flags runs differ that are alike otherwise."""
    known = [run for run in runs if run.inputs]
    if len(known) < 2:
        return ""
    shared = [key for key in known[0].inputs if all(key in run.inputs for run in known)]
    found = []
    for key in shared:
        values = [run.inputs[key] for run in known]
        if key.startswith("--") and any(value != values[0] for value in values):
            found.append(f"{key} {', '.join(str(_shown(value)) for value in values)}")
    if not found or len(found) > _MOST_FLAGS:
        return ""
    return f"In the order of the runs they differ in {'; '.join(found)}."


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(_short(one) for one in value)
    return _short(value) if isinstance(value, str) else f"{value}"


def _counts(found: Found) -> str:
    parts = []
    for count, name, names in (
        (len(found.training), "training run", "training runs"),
        (len(found.evaluations), "evaluation", "evaluations"),
        (len(found.studies), "study", "studies"),
    ):
        if count:
            parts.append(f"{count} {name if count == 1 else names}")
    return ", ".join(parts) + "." if parts else ""


def _look_first(found: Found, *, compared: bool) -> str:
    """Return where to begin."""
    if compared:
        return (
            "Look first at the differences: those with an interval come first, and one whose "
            "interval holds 0 may be chance. Then at the curves, and at the samples for what it "
            "means in text."
        )
    if found.evaluations or found.studies:
        return "Look first at the score with its interval, then at the curves and the samples."
    wanted = (
        ("eval/divergence", "the held-out divergence: it should fall, and not rise again"),
        ("eval/loss", "the held-out loss: it should fall, and not rise again"),
        ("train/divergence", "the divergence in training: it should fall, fast at first"),
        ("train/loss", "the loss: it should fall, fast at first"),
    )
    logged = set().union(*(run.names() for run in found.training))
    what = next((text for key, text in wanted if key in logged), "")
    waits = " Then at where the time went: waiting for the teacher is lost to training."
    return f"Look first at {what}.{waits if 'time/teacher' in logged else ''}" if what else ""


def _short(name: str) -> str:
    """Return the last part of a folder's or file's path; a name on the Hub stays whole."""
    text = str(name)
    return Path(text).name if text.startswith(("/", ".", "~")) or text.count("/") > 1 else text


def _quoted(name: str) -> str:
    """Return the short name in quotes: a model may be called before, or student."""
    return f"“{_short(name)}”"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
