"""Read the curves, seconds, scores and samples of runs from their folders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigurationError
from student_trainer.reporting.files import Files
from student_trainer.reporting.names import grouped

Point = tuple[float, float]

# Begins with an underscore, so that transformers' Trainer does not upload the data it quotes.
HELD_OUT_FILE = "_held_out_samples.json"

# What a run that trains has logged so far, a line each: first {"max_steps": ...}, then the entries
# of trainer_state.json's log_history. Deleted when that is written.
LIVE_FILE = "_log_history.jsonl"

INPUTS_FILE = "training_inputs.json"  # what a run was trained with, see `training.inputs`

_DIVERGENCE_FLAGS = (
    "--beta", "--temperature", "--tail", "--teacher_support", "--top_k_logprobs",
)  # fmt: skip

# The parts of a step's seconds: name in the log, and label.
_PARTS = {
    "time/teacher": "waiting for the teacher",
    "time/generating": "generating",
    "time/syncing": "syncing weights",
    "time/forward_backward": "forward and backward",
    "time/optimizer": "optimizer",
}


@dataclass(frozen=True)
class TrainingRun:
    """A run in a folder of `sft` or `distill`, or what it has logged so far while it trains.

    Attributes:
        history: what was logged, in the order of the steps, under the names of `reporting.names`.
        samples: the content of `HELD_OUT_FILE`, if there is one.
        max_steps: the step at which it ends, if that is known.
        logged: when it last logged, in seconds since 1970; None once it has ended.
        seeds: of a study's cell, seed -> its history; ``history`` is their mean.
        inputs: what training_inputs.json says of it, such as flags; empty where it is missing.
    """

    name: str
    folder: Path
    history: list[dict[str, Any]]
    samples: dict[str, Any] | None
    max_steps: int | None = None
    logged: float | None = None
    seeds: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def divergence(self) -> dict[str, Any]:
        """The flags that say which divergence it learns; empty where they are unknown."""
        return {name: self.inputs[name] for name in _DIVERGENCE_FLAGS if name in self.inputs}

    def teachers(self) -> dict[str, str]:
        """Return the models of its teachers by name; one without a name has ""."""
        found = {}
        for key, model in self.inputs.items():
            whose, _, what = key.rpartition("'s ")
            if whose.startswith("the teacher") and what == "model":
                found[whose.removeprefix("the teacher").strip()] = str(model)
        return found

    def names(self) -> set[str]:
        """Return all names that were logged."""
        return {name for entry in self.history for name in entry}

    def points(self, name: str) -> list[Point]:
        """Return (step, value) of everything that was logged under that name."""
        return [(float(e["step"]), float(e[name])) for e in self.history if name in e]

    def last(self, name: str) -> float | None:
        return next((float(e[name]) for e in reversed(self.history) if name in e), None)

    def last_of_seeds(self, name: str) -> dict[str, float]:
        """Return the last value under that name by seed; a run that is no cell has none."""
        runs = {seed: replace(self, history=history) for seed, history in self.seeds.items()}
        found = {seed: run.last(name) for seed, run in runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def learns_divergence_alone(self) -> bool:
        """Return whether its loss is the divergence, without a part of cross-entropy.

        Both are means over a window, one by steps and one by tokens, so they differ a little.
        """
        if self.inputs.get("--sft_weight") is not None:
            return float(self.inputs["--sft_weight"]) == 0 and "--lmbda" in self.inputs
        loss, divergence = dict(self.points("train/loss")), dict(self.points("train/divergence"))
        return bool(divergence) and all(
            abs(value - divergence.get(step, math.inf)) <= 0.05 * abs(value)
            for step, value in loss.items()
        )

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all steps by part; logged are means over windows of steps."""
        totals: dict[str, float] = {}
        last = 0.0
        for entry in self.history:
            if "time/step" not in entry:
                continue
            window, last = entry["step"] - last, entry["step"]
            named = 0.0
            for key, part in _PARTS.items():
                if key in entry:
                    named += entry[key]
                    totals[part] = totals.get(part, 0.0) + entry[key] * window
            rest = max(entry["time/step"] - named, 0.0)
            totals["the rest"] = totals.get("the rest", 0.0) + rest * window
        return {part: value for part, value in totals.items() if value >= 0.05}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation in a folder that `evaluate` wrote.

    Attributes:
        results: the content of results.json.
        samples: completions and verdicts by problem, the first of each.
        passed: the share of its completions that pass, by problem.
    """

    name: str
    folder: Path
    results: dict[str, Any]
    samples: dict[str, dict[str, Any]]
    passed: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        return {
            name: float(value)
            for name, value in self.results.items()
            if name.startswith("pass@") or name in ("exact_match", "final_number")
        }

    def place_among(self, runs: Sequence[TrainingRun]) -> int | None:
        """Return the place of the run whose own model was evaluated, or None.

        A folder that is there no more, as it was moved or is mounted elsewhere, is recognized by
        its name if only one run has it.
        """
        model = Path(str(self.results.get("model", "")))
        same = [i for i, run in enumerate(runs) if model.resolve() == run.folder.resolve()]
        if not same and not model.exists():
            named = [i for i, run in enumerate(runs) if model.name == run.folder.name]
            same = named if len(named) == 1 else []
        return same[0] if same else None


@dataclass(frozen=True)
class StudyRun:
    """A study in a folder that `study` wrote.

    Attributes:
        cells: cell -> mean, 95 % interval and number of seeds.
        differences: the same of cell − base for each pair that the study compares.
    """

    title: str
    metric: str
    cells: dict[str, dict[str, Any]]
    differences: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Found:
    """The runs, evaluations and studies that the folders hold, in their order."""

    training: list[TrainingRun] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    studies: list[StudyRun] = field(default_factory=list)


def find_runs(folders: Sequence[Path], files: Files | None = None) -> Found:
    """Return the runs in the folders themselves or, where there is none, in their subfolders.

    Two runs that would have one name have the names of their parent folders before it.

    Args:
        files: what an earlier call has read; only what has changed is read again.

    Raises:
        ConfigurationError: a folder that is missing or holds no run.
        DatasetError: a file in it that cannot be read.
    """
    found, files = Found(), files or Files()
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(f"{folder}: no such folder; give the --output_dir of a run")
        count = 0
        for place in _places(folder, files):
            count += _read(place, folder, found, files)
        if not count:
            raise ConfigurationError(
                f"{folder} holds no run: neither trainer_state.json (sft, distill), nor "
                "results.json (evaluate, study), nor a folder with one"
            )
    found.training = _distinct(found.training)
    found.evaluations = _distinct(found.evaluations)
    return found


def find_runs_so_far(
    folders: Sequence[Path], files: Files | None = None
) -> tuple[Found, list[Path]]:
    """Return `find_runs` of the folders that hold a run by now, and the other folders.

    Raises:
        DatasetError: a file that cannot be read, as while it is being written.
    """
    begun: list[Path] = []
    missing: list[Path] = []
    files = files or Files()
    for folder in folders:
        started = folder.is_dir() and any(True for _ in _places(folder, files))
        (begun if started else missing).append(folder)
    return find_runs(begun, files), missing


_STUDY_KEYS = {"title", "metric", "cells"}
_EVALUATION_KEYS = {"model", "problems", "n"}
_Named = TypeVar("_Named", TrainingRun, Evaluation)


def _distinct(runs: list[_Named]) -> list[_Named]:
    """Return the runs with other names for those that would share one."""
    counts = Counter(run.name for run in runs)
    named: list[_Named] = []
    for i, run in enumerate(runs):
        if counts[run.name] > 1:
            longer = f"{run.folder.resolve().parent.name}/{run.name}"
            taken = {other.name for other in named}
            run = replace(run, name=longer if longer not in taken else f"{longer} ({i + 1})")
        named.append(run)
    return named


def _places(folder: Path, files: Files) -> Iterator[Path]:
    """Yield the folder if it is a run or a study, else all runs up to two folders below."""
    if _is_run(folder, files):
        yield folder
        return
    for child in sorted(p for p in folder.iterdir() if p.is_dir()):
        if _is_run(child, files):
            yield child
        else:
            yield from sorted(p for p in child.iterdir() if p.is_dir() and _is_run(p, files))


def _is_run(folder: Path, files: Files) -> bool:
    if folder.name.startswith("checkpoint-"):
        return False
    if _state_file(folder) is not None:
        return True
    results = folder / "results.json"
    if not results.exists():
        return False
    content = files.json(results)  # other programs write a file of this name, too
    return isinstance(content, dict) and any(
        keys <= content.keys() for keys in (_STUDY_KEYS, _EVALUATION_KEYS)
    )


def _state_file(folder: Path) -> Path | None:
    """Return the file that says most of a run, or None.

    `LIVE_FILE` while it trains, trainer_state.json when it has ended, else its last checkpoint's.
    """
    for whole in (folder / LIVE_FILE, folder / "trainer_state.json"):
        if whole.exists():
            return whole
    checkpoints = sorted(
        folder.glob("checkpoint-*/trainer_state.json"),
        key=lambda path: int(path.parent.name.rpartition("-")[2] or 0),
    )
    return checkpoints[-1] if checkpoints else None


def _read(folder: Path, given: Path, found: Found, files: Files) -> int:
    name = folder.resolve().name if folder == given else str(folder.relative_to(given))
    state = _state_file(folder)
    if state is not None:
        found.training.append(_training_run(name, folder, state, files))
        return 1
    results = files.json(folder / "results.json")
    if "cells" in results:
        pairs = [pair for table in results.get("differences", {}).values() for pair in table]
        found.studies.append(StudyRun(results["title"], results["metric"], results["cells"], pairs))
        found.training += _cell_means(folder, list(results["cells"]), files)
    else:
        found.evaluations.append(Evaluation(name, folder, results, *_samples(folder, files)))
    return 1


def _training_run(name: str, folder: Path, state: Path, files: Files) -> TrainingRun:
    history, max_steps = _logged(state, files)
    ended = state.parent == folder and state.name != LIVE_FILE
    return TrainingRun(
        name,
        folder,
        history,
        read_held_out(folder, files),
        max_steps=max_steps,
        logged=None if ended else state.stat().st_mtime,
        inputs=_inputs(state.parent, files) or _inputs(folder, files),
    )


def _inputs(folder: Path, files: Files) -> dict[str, Any]:
    """Return what training_inputs.json in a folder says; flags begin with two dashes."""
    path = folder / INPUTS_FILE
    known = files.json(path) if path.exists() else {}
    return {**known.get("told", {}), **known.get("same", {})}


def _logged(state: Path, files: Files) -> tuple[list[dict[str, Any]], int | None]:
    """Return what was logged, under the names of `reporting.names`, and the last step if known."""
    if state.name != LIVE_FILE:
        content = files.json(state, _with_grouped_names)
        return content["log_history"], content.get("max_steps")
    first, *entries = files.appended_lines(state, grouped) or [{}]
    return entries, first.get("train/max_steps")  # renamed like the entries


def _with_grouped_names(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "log_history": [grouped(entry) for entry in state["log_history"]]}


def _cell_means(folder: Path, cells: Sequence[str], files: Files) -> Iterator[TrainingRun]:
    """Yield each trained cell of a study as one run, the mean of its seeds at each step."""
    for cell in cells:
        states = {seed.name: _state_file(seed / cell) for seed in sorted(folder.glob("seed-*"))}
        seeds = {
            seed: _logged(state, files)[0] for seed, state in states.items() if state is not None
        }
        if seeds:
            mean = _means(list(seeds.values()))
            inputs = _inputs(folder / next(iter(seeds)) / cell, files)
            yield TrainingRun(cell, folder, mean, None, seeds=seeds, inputs=inputs)


def _means(histories: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mean entries of the steps that all histories logged.

    A run that was resumed may have a window that the others have not.
    """
    by_place = [{_place(entry): entry for entry in history} for history in histories]
    shared = [place for place in by_place[0] if all(place in other for other in by_place)]
    return [_mean(*(history[place] for history in by_place)) for place in shared]


def _place(entry: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the step of an entry, and whether it is of an evaluation, a window or the end."""
    if any(name.startswith("eval/") for name in entry):
        return entry.get("step"), "evaluation"
    return entry.get("step"), "end" if "train/runtime" in entry else "window"


def _mean(*entries: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in entries[0] if all(name in entry for entry in entries)]
    return {name: sum(entry[name] for entry in entries) / len(entries) for name in names}


def read_held_out(folder: Path, files: Files | None = None) -> dict[str, Any] | None:
    """Return the content of `HELD_OUT_FILE` in a folder, or None."""
    path = folder / HELD_OUT_FILE
    return (files or Files()).json(path) if path.exists() else None


def _samples(folder: Path, files: Files) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the first completion of each problem, and the share of each that passes."""
    first: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, list[bool]] = {}
    for sample in files.json_lines(folder / "samples.jsonl"):
        first.setdefault(sample["task_id"], sample)
        verdicts.setdefault(sample["task_id"], []).append(bool(sample["passed"]))
    return first, {task: sum(passed) / len(passed) for task, passed in verdicts.items()}
