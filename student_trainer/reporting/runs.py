"""Read the curves, seconds, scores and samples of runs from their folders."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError, DatasetError
from student_trainer.reporting.names import grouped

Point = tuple[float, float]

# Begins with an underscore, so that transformers' Trainer does not upload the data it quotes.
HELD_OUT_FILE = "_held_out_samples.json"

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
    """A run in a folder of `sft` or `distill`, or up to its last checkpoint while it trains.

    Attributes:
        history: what was logged, in the order of the steps, under the names of `reporting.names`.
        samples: the content of `HELD_OUT_FILE`, if there is one.
    """

    name: str
    folder: Path
    history: list[dict[str, Any]]
    samples: dict[str, Any] | None

    def points(self, name: str) -> list[Point]:
        """Return (step, value) of everything that was logged under that name."""
        return [(float(e["step"]), float(e[name])) for e in self.history if name in e]

    def last(self, name: str) -> float | None:
        points = self.points(name)
        return points[-1][1] if points else None

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
    """

    name: str
    folder: Path
    results: dict[str, Any]
    samples: dict[str, dict[str, Any]]

    @property
    def scores(self) -> dict[str, float]:
        return {
            name: float(value)
            for name, value in self.results.items()
            if name.startswith("pass@") or name == "exact_match"
        }

    def of(self, run: TrainingRun) -> bool:
        """Return whether it was the run's own model that was evaluated."""
        model = Path(str(self.results.get("model", "")))
        # A folder that was moved or is mounted elsewhere is recognized by its name.
        return model.name == run.folder.name or model.resolve() == run.folder.resolve()


@dataclass(frozen=True)
class StudyRun:
    """A study in a folder that `study` wrote: cell -> mean, 95 % interval and number of seeds."""

    title: str
    metric: str
    cells: dict[str, dict[str, Any]]


@dataclass
class Found:
    """The runs, evaluations and studies that the folders hold, in their order."""

    training: list[TrainingRun] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    studies: list[StudyRun] = field(default_factory=list)


def find_runs(folders: Sequence[Path]) -> Found:
    """Return the runs in the folders themselves or, where there is none, in their subfolders.

    Raises:
        ConfigurationError: a folder that is missing or holds no run.
        DatasetError: a file in it that cannot be read.
    """
    found = Found()
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(f"{folder}: no such folder; give the --output_dir of a run")
        count = 0
        for place in _places(folder):
            count += _read(place, folder, found)
        if not count:
            raise ConfigurationError(
                f"{folder} holds no run: neither trainer_state.json (sft, distill), nor "
                "results.json (evaluate, study), nor a folder with one"
            )
    return found


def _places(folder: Path) -> Iterator[Path]:
    """Yield the folder if it is a run or a study, else all runs up to two folders below."""
    if _is_run(folder):
        yield folder
        return
    for child in sorted(p for p in folder.iterdir() if p.is_dir()):
        if _is_run(child):
            yield child
        else:
            yield from sorted(p for p in child.iterdir() if p.is_dir() and _is_run(p))


def _is_run(folder: Path) -> bool:
    if folder.name.startswith("checkpoint-"):
        return False
    if _state_file(folder) is not None:
        return True
    results = folder / "results.json"
    return results.exists() and bool({"cells", "model"} & _json(results).keys())


def _state_file(folder: Path) -> Path | None:
    """Return trainer_state.json of a finished run, or that of its last checkpoint, or None."""
    whole = folder / "trainer_state.json"
    if whole.exists():
        return whole
    checkpoints = sorted(
        folder.glob("checkpoint-*/trainer_state.json"),
        key=lambda path: int(path.parent.name.rpartition("-")[2] or 0),
    )
    return checkpoints[-1] if checkpoints else None


def _read(folder: Path, given: Path, found: Found) -> int:
    name = folder.resolve().name if folder == given else str(folder.relative_to(given))
    state = _state_file(folder)
    if state is not None:
        history = _history(state)
        found.training.append(TrainingRun(name, folder, history, read_held_out(folder)))
        return 1
    results = _json(folder / "results.json")
    if "cells" in results:
        found.studies.append(StudyRun(results["title"], results["metric"], results["cells"]))
        found.training += _cell_means(folder, list(results["cells"]))
    else:
        found.evaluations.append(Evaluation(name, folder, results, _samples(folder)))
    return 1


def _cell_means(folder: Path, cells: Sequence[str]) -> Iterator[TrainingRun]:
    """Yield each trained cell of a study as one run, the mean of its seeds at each step."""
    for cell in cells:
        files = [_state_file(seed / cell) for seed in sorted(folder.glob("seed-*"))]
        histories = [_history(file) for file in files if file is not None]
        if histories:
            yield TrainingRun(cell, folder, list(map(_mean, *histories)), None)


def _history(state: Path) -> list[dict[str, Any]]:
    return [grouped(entry) for entry in _json(state)["log_history"]]


def _mean(*entries: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in entries[0] if all(name in entry for entry in entries)]
    return {name: sum(entry[name] for entry in entries) / len(entries) for name in names}


def read_held_out(folder: Path) -> dict[str, Any] | None:
    """Return the content of `HELD_OUT_FILE` in a folder, or None."""
    path = folder / HELD_OUT_FILE
    return _json(path) if path.exists() else None


def _samples(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "samples.jsonl"
    samples: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        sample = json.loads(line)
        samples.setdefault(sample["task_id"], sample)
    return samples


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON: {error}") from error
    return content


def wilson_interval(share: float, n: int) -> Point:
    """Return the 95 % interval of a share of n independent trials, within 0 and 1.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209–212.
    """
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(middle - reach, 0.0), min(middle + reach, 1.0)
