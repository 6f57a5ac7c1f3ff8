"""Settle what the flags of a run leave open, and keep it for a run that goes on."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from student_trainer.config.arguments import Recipe
from student_trainer.config.training_arguments import CommonTrainingArguments, checkpoint_of
from student_trainer.model.load import usual_dtype
from student_trainer.training.inputs import FILE


def settle(recipe: Recipe, args: CommonTrainingArguments) -> Recipe:
    """Return a recipe whose ``torch_dtype`` and ``lora_alpha`` are those of this run.

    ``--torch_dtype auto`` is what a checkpoint that is gone on from was trained in, else float32
    with --bf16 or --fp16, whose optimizer steps need float32 weights, else `usual_dtype`.
    """
    model, adapters = copy.copy(recipe.model), copy.copy(recipe.adapters)
    if model.loaded is not None:
        model.torch_dtype = str(model.loaded.model.dtype).removeprefix("torch.")  # type: ignore[assignment]
    elif model.torch_dtype == "auto":
        mixed = args.bf16 or args.fp16
        usual = "float32" if mixed else usual_dtype(gpu=not args.use_cpu)
        model.torch_dtype = _kept_dtype(checkpoint_of(args)) or usual  # type: ignore[assignment]
    adapters.lora_alpha = adapters.alpha
    return replace(recipe, model=model, adapters=adapters)


def _kept_dtype(checkpoint: str | None) -> str | None:
    """Return the dtype that a checkpoint says it was trained in, or None."""
    if checkpoint is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):  # said by `check_resumed`
        kept = str(json.loads((Path(checkpoint) / FILE).read_text())["told"]["--torch_dtype"])
        return "checkpoint" if kept == "auto" else kept  # its meaning until there was a usual one
    return None
