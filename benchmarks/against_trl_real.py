"""The comparison with TRL on a published model: the whole one teaches some of its own layers.

Every step is on-policy, which is all that TRL's DistillationTrainer does, and learns by forward KL:
a student of few layers is disjoint from its teacher, where other divergences have no gradient.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks.against_trl as pairs
from benchmarks.harness import Cell, print_report, run_apart
from benchmarks.real_models import prune

HELD_OUT, TRAIN = 6, 64  # rows
PROMPT, COMPLETION = 32, 48  # words of a row; generated tokens
ARGUMENTS: dict[str, Any] = {
    **pairs.ARGUMENTS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lmbda": 1.0,
    "beta": 0.0,
    "max_new_tokens": COMPLETION,
}
COLUMNS = ("trainer", "s/step", "CPU s", "trainer MiB", "all MiB", "held-out")
_KEYS = {pairs.TRL: "trl_gkd", pairs.DISTILLATION: "trl_distillation", pairs.OURS: "ours"}
NOTES = (
    f"2 rows x 2 micro-batches a step, prompts of {PROMPT} words, {COMPLETION} generated tokens, "
    "all steps on-policy, beta 0, float32, KV cache. A step's time is a median; CPU s: of a step, "
    "all processes. Memory: peak of the resident set; of all processes, the sum of their peaks.",
    "Held-out: dense forward KL to the teacher, nats a token, after as many steps; in the row of "
    "no trainer, before them.",
)


def prepare(folder: Path, model: Path, layers: int, rows: Path) -> None:
    """Make student and rows in ``folder``, with the teacher beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    prune(model, folder / "student", layers, "float32")
    (folder / "teacher").symlink_to(model)
    lines = rows.read_text().splitlines()[: HELD_OUT + TRAIN]
    texts = [json.loads(line) for line in lines]
    for name, part in (("held_out", texts[:HELD_OUT]), ("train", texts[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(_row(one)) for one in part))
    (folder / "ready").touch()


def _row(row: dict[str, str]) -> dict[str, Any]:
    question, answer = (
        " ".join(row[name].split()[:words])
        for name, words in (("question", PROMPT), ("answer", COMPLETION))
    )
    return {"messages": pairs.messages((question, answer))}


def compare(
    model: Path, layers: int, rows: Path, work: Path, python: Path, *, steps: int, quick: bool
) -> None:
    """Run the three trainers by turns, and print the report.

    Args:
        model, layers: the teacher, and how many of its layers the student keeps.
        rows: GSM8K's JSONL.
        work: folder for students and logs.
        python: interpreter of an environment with TRL.
        steps: whose time counts.
    """
    folder = work / f"real-{model.name}-{layers}"
    if not (folder / "ready").exists():
        run_apart(prepare, folder, model.absolute(), layers, rows)
    trainers: dict[str, Callable[[], pairs.Run]] = {
        pairs.TRL: lambda: pairs.train_trl(
            folder, folder / "gkd", steps, 0, python, arguments=ARGUMENTS
        ),
        pairs.DISTILLATION: lambda: pairs.train_trl(
            folder, folder / "distillation", steps, 0, python,
            trainer="distillation", arguments=ARGUMENTS,
        ),
        pairs.OURS: lambda: pairs.train_ours(folder, folder / "ours", steps, 0, given=ARGUMENTS),
    }  # fmt: skip
    runs = {name: train() for name, train in trainers.items()}
    students = [folder / "student", *(run.student for run in runs.values())]
    before, *after = run_apart(pairs.held_out_divergences, folder, students, ARGUMENTS["beta"])
    held_out = dict(zip(runs, after, strict=True))
    table: list[list[Cell]] = [["no trainer", *["-"] * 4, before]]
    seconds = {name: statistics.median(run.seconds[True]) for name, run in runs.items()}
    for name, run in runs.items():
        memory = [f"{size / 2**20:.0f}" for size in (run.trainer_memory, run.memory)]
        table.append([name, seconds[name], run.cpu_seconds, *memory, held_out[name]])
    ours = runs[pairs.OURS]
    figures: dict[str, Any] = {"benchmark": "against_trl", "model": model.name, "quick": quick}
    for key, name in _KEYS.items():
        figures[f"seconds_{key}"] = round(seconds[name], 3)
        figures[f"trainer_mib_{key}"] = round(runs[name].trainer_memory / 2**20)
        figures[f"mib_{key}"] = round(runs[name].memory / 2**20)
        figures[f"held_out_{key}"] = round(held_out[name], 3)
    for suffix, name in (("", pairs.TRL), ("_distillation_trainer", pairs.DISTILLATION)):
        other = runs[name]
        figures |= {
            f"speedup_real{suffix}": seconds[name] / seconds[pairs.OURS],
            f"cpu_ratio_real{suffix}": other.cpu_seconds / ours.cpu_seconds,
            f"trainer_memory_ratio_real{suffix}": ours.trainer_memory / other.trainer_memory,
            f"memory_ratio_real{suffix}": ours.memory / other.memory,
            f"divergence_ratio_real{suffix}": held_out[pairs.OURS] / held_out[name],
        }
    print_report(f"{layers} layers of {model.name}", COLUMNS, table, figures, notes=NOTES)
