"""Say in a few lines what a run is about to do, and at its end what it left and what comes next."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from shared.errors import ConfigurationError
from shared.logs import in_json
from shared.printable import printable
from student_trainer.commands.dry_run import (
    describe_divergence,
    describe_memory,
    describe_method,
    describe_student,
    describe_tokens,
    describe_updates,
    memory_of,
)
from student_trainer.commands.dry_run_teacher import describe_teacher
from student_trainer.config.arguments import uses_deepspeed
from student_trainer.config.suites import HUB
from student_trainer.config.training_arguments import (
    CommonTrainingArguments,
    DistillArguments,
    checkpoint_of,
)
from student_trainer.data.stream import ExampleStream
from student_trainer.reporting.lines import number, readable_seconds
from student_trainer.runtime.terminal import encodable, width_of
from student_trainer.teacher.named import Teachers
from student_trainer.training.memory import Memory
from student_trainer.training.model_card import sampling_of

if TYPE_CHECKING:
    from student_trainer.config.arguments import Recipe
    from student_trainer.training.recipe import Prepared
    from student_trainer.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

_ROWS = 2000  # whose lengths stand for those of all rows
_LARGE = 1_000_000_000  # parameters
_MEASURES = ("eval/divergence", "eval/loss", "train/divergence", "train/loss")
_MEASURE_NAMES = {
    "eval/divergence": "held-out divergence",
    "eval/loss": "held-out loss",
    "train/divergence": "divergence in training",
    "train/loss": "loss in training",
}


def say_start(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    *,
    teachers: Teachers | None = None,
) -> None:
    """Write what the run will do to standard error, on the main process alone."""
    if not PartialState().is_main_process:
        return
    streams = isinstance(prepared.train, ExampleStream)
    # A stream is read once, by the run itself.
    some = replace(prepared, train=[] if streams else prepared.train[:_ROWS])
    memory = _estimate(recipe, prepared, args)
    lines = {"method": describe_method(args)}
    if isinstance(args, DistillArguments):
        lines["method"] += f"; {describe_divergence(args, prepared.method)}"
        lines |= {"rollouts": sampling} if (sampling := sampling_of(args)) else {}
    lines["student"] = describe_student(recipe, memory)
    for name, teacher in [] if teachers is None else teachers.items():
        lines |= dict(describe_teacher(name, teacher, prepared)[:1])
    lines["data"] = _data(prepared, some, recipe)
    if not streams:
        lines["tokens"] = f"{describe_tokens(some, args)[0]} a step"
    lines["steps"] = describe_updates(prepared, args, streaming=streams)
    if memory is not None:
        lines["memory"] = _memory(memory, args)
    lines["output"] = _output(args)
    _write_table(lines)
    if memory is not None:
        mixed = bool(args.bf16 or args.fp16)
        warn_of_float32(recipe.model.torch_dtype, memory.parameters, mixed=mixed)


def warn_of_float32(dtype: str, parameters: int, *, mixed: bool) -> None:
    """Warn of a large model that a GPU trains in float32 alone.

    Args:
        mixed: it computes in 16 bits, and only its weights are float32.
    """
    if dtype == "float32" and parameters > _LARGE and not mixed and torch.cuda.is_available():
        logger.warning(
            "--torch_dtype float32: a GPU trains %s parameters several times slower in it than in "
            "bfloat16, and in twice the memory; give bfloat16, or --bf16 to keep float32 weights "
            "and compute in bfloat16",
            f"{parameters:,}",
        )


def say_end(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    trainer: DistillationTrainer,
) -> None:
    """Write to standard error what a finished run left, and the next two commands to type."""
    if not trainer.is_world_process_zero():
        return
    history: Sequence[Mapping[str, Any]] = trainer.state.log_history
    folder = str(args.output_dir)
    took = [entry["train/runtime"] for entry in history if "train/runtime" in entry][-1:]
    seconds = f" in {readable_seconds(took[0])}" if took else ""
    made = describe_steps(trainer.state.global_step, trainer.begun)
    lines = [f"Done: {made}{seconds}; the model is in {folder}"]
    lines += [change] if (change := describe_change(history)) else []
    commands = next_commands(recipe, prepared, folder)
    if in_json():
        logger.info("%s", "; ".join(lines), extra={"next_commands": commands})
        return
    lines += ["Next:", *(f"  {command}" for command in commands)]
    _write(lines)


def describe_steps(last: int, first: int) -> str:
    """Return the steps of a run, which a resumed one tells apart from those before it."""
    if first == last > 0:
        return f"all {last} steps had been learned (more by --max_steps or --num_train_epochs)"
    return f"step {last} ({last - first} steps here)" if first else f"{last} steps"


def describe_change(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the first and last value of what tells most of a run, or "" of an empty log."""
    for name in _MEASURES:
        found = [(entry["step"], entry[name]) for entry in history if name in entry]
        if name.startswith("eval/") and len(found) < 2:
            continue
        if found:
            (first, before), (last, after) = found[0], found[-1]
            change = f"{number(before)} → {number(after)}" if first < last else number(after)
            steps = f"steps {first} → {last}" if first < last else f"step {last}"
            return f"{_MEASURE_NAMES[name]} {change} ({steps})"
    return ""


def next_commands(recipe: Recipe, prepared: Prepared, folder: str) -> list[str]:
    """Return two command lines: `evaluate` where the data can be checked, and what else fits.

    That is `merge` for LoRA adapters, else `report`. Without a checker there is nothing to
    evaluate: then `report` is the first, and a server of the model the second.
    """
    code = ["--trust_remote_code"] if recipe.model.trust_remote_code else []
    model = ["--model_name_or_path", folder, *code]
    report = ["student-trainer", "report", folder]
    merge = ["student-trainer", "merge", *model, "--output_dir", f"{folder.rstrip('/')}-merged"]
    rows = _checked_rows(recipe, prepared)
    if rows:
        scored = ["--output_dir", str(Path(folder) / "evaluation")]
        evaluate = ["student-trainer", "evaluate", *model, *rows, *scored]
        commands = [evaluate, merge if recipe.adapters.use_peft else report]
    else:
        serve = ["teacher-server", "serve", folder, *(name.replace("_", "-") for name in code)]
        commands = [report, merge if recipe.adapters.use_peft else serve]
    return [shlex.join(argv) for argv in commands]


def _checked_rows(recipe: Recipe, prepared: Prepared) -> list[str]:
    """Return the flags of `evaluate` for rows of the run's own task with checkers, or none."""
    data, limit = recipe.data, ["--max_new_tokens", str(recipe.generation.max_new_tokens)]
    has_checkers = any(example.checker is not None for example in prepared.held_out or [])
    if has_checkers and data.eval_dataset_name and data.eval_rows is None:
        rows = ["--dataset_name", data.eval_dataset_name]
        if not Path(data.eval_dataset_name).exists():
            rows += ["--dataset_split", data.eval_dataset_split]
        return [*rows, *limit]
    for suite, (name, _, _) in HUB.items():
        if recipe.dataset.rows is None and name in recipe.dataset.dataset_name:
            return ["--suite", suite, *limit]
    return []


def _estimate(recipe: Recipe, prepared: Prepared, args: CommonTrainingArguments) -> Memory | None:
    """Return the memory of a step, or None where it is not known from the configuration."""
    if uses_deepspeed(args):  # making a model is a collective operation under ZeRO-3
        return None
    try:
        return memory_of(recipe, prepared, args)
    except ConfigurationError:  # a model in memory of a class that transformers does not know
        return None


def _memory(memory: Memory, args: CommonTrainingArguments) -> str:
    parts = describe_memory(memory, args)
    together, each = parts.pop("together"), " a process" if args.world_size > 1 else ""
    named = ", ".join(f"{name} {size}" for name, size in parts.items())
    return f"{together}{each} and activations: {named}"


def _data(prepared: Prepared, some: Prepared, recipe: Recipe) -> str:
    held_out = 0 if prepared.held_out is None else len(prepared.held_out)
    if recipe.data.streaming:
        return f"a stream of which {len(prepared.train):,} rows are read; {held_out:,} held out"
    prompts = [len(example.prompt_ids) for example in some.train]
    written = [e.sample.completion_mask.sum() for e in some.train if e.sample is not None]
    text = f"{len(prepared.train):,} rows, {held_out:,} held out; means of "
    text += f"{sum(prompts) / len(prompts):.0f} prompt tokens"
    if written:
        text += f", {float(sum(written)) / len(written):.0f} of the completion"
    return text


def _output(args: CommonTrainingArguments) -> str:
    every = {
        "steps": f"a checkpoint every {args.save_steps:g} steps",
        "epoch": "a checkpoint every epoch",
        "best": "a checkpoint of the best evaluation",
    }.get(args.save_strategy.value, "no checkpoint before the end")
    checkpoint = checkpoint_of(args)
    begun = "" if checkpoint is None else f"; goes on from {Path(checkpoint).name}"
    return f"{args.output_dir}; {every}{begun}"


def _write_table(lines: Mapping[str, str]) -> None:
    if in_json():
        logger.info("the run begins", extra={"run": dict(lines)})
        return
    width = max(len(name) for name in lines) + 2
    table = [name.ljust(width) + printable(text) for name, text in lines.items()]
    columns = width_of(sys.stderr)
    if columns is not None:
        table = [line if len(line) <= columns else line[: columns - 1] + "…" for line in table]
    _write(table)


def _write(lines: Sequence[str]) -> None:
    sys.stderr.write(encodable("\n".join(lines), sys.stderr) + "\n")
    sys.stderr.flush()
