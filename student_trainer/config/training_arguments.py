"""The `TrainingArguments` of transformers for a run, made from checked flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from shared.errors import ConfigurationError
from shared.logs import can_move
from student_trainer.config.arguments import (
    DistillFlags,
    DivergenceFlags,
    RunFlags,
    TrainingFlags,
    uses_deepspeed,
)
from student_trainer.config.trainer_flags import trainer_flags


@dataclass
class CommonTrainingArguments(RunFlags, TrainingArguments):
    """The `TrainingArguments` of transformers, with the defaults that this trainer needs."""

    def __post_init__(self) -> None:
        # transformers allows bfloat16 on a CPU only when use_cpu is set.
        if not torch.accelerator.is_available():
            self.use_cpu = True
            if uses_deepspeed(self) and "LOCAL_RANK" in os.environ:
                import deepspeed

                # accelerate initialises it for accelerators only; ZeRO-3 would count one process.
                deepspeed.init_distributed("gloo")
        if self.disable_tqdm is None and not can_move():
            self.disable_tqdm = True
        if self.eval_steps is None:
            self.eval_steps = self.save_steps  # transformers would take --logging_steps
        best = self.metric_for_best_model
        if self.greater_is_better is None and best is not None:
            # transformers maximises every metric whose name does not end in "loss".
            self.greater_is_better = not best.endswith(("loss", "divergence"))
        super().__post_init__()


@dataclass
class SFTArguments(CommonTrainingArguments):
    """The arguments of supervised fine-tuning."""


@dataclass
class DistillArguments(DivergenceFlags, CommonTrainingArguments):
    """The arguments of distillation from a served teacher."""


def training_arguments(flags: TrainingFlags) -> CommonTrainingArguments:
    """Make the Trainer's arguments, which sets up devices and process groups.

    Raises:
        ConfigurationError: a value or a combination that transformers refuses.
    """
    kind = DistillArguments if isinstance(flags, DistillFlags) else SFTArguments
    usual, ours = trainer_flags(), {one.name for one in fields(RunFlags)}
    given = {
        one.name: getattr(flags, one.name)
        for one in fields(flags)
        # transformers' own defaults may depend on the machine, so equal values are left out.
        if one.name in ours
        or one.name not in usual
        or getattr(flags, one.name) != usual[one.name].default
    }
    try:
        return kind(**given)
    except (ValueError, ImportError) as error:
        raise ConfigurationError(str(error)) from error


def checkpoint_of(args: CommonTrainingArguments) -> str | None:
    """Return the checkpoint folder to resume from, or None.

    ``true`` is the last one in ``--output_dir``; ``auto`` is the same, or None where there is none
    yet, for services that restart with the same command.

    Raises:
        ConfigurationError: there is no such checkpoint.
    """
    given = args.resume_from_checkpoint
    if given is None or given.lower() == "false":
        return None
    if given.lower() in ("true", "auto"):
        folder = Path(args.output_dir or "")
        last: str | None = get_last_checkpoint(folder) if folder.is_dir() else None
        if last is None and given.lower() == "true":
            raise ConfigurationError(
                f"--resume_from_checkpoint {given}: {folder} holds no checkpoint to resume from"
            )
        return last
    if not (Path(given) / "trainer_state.json").exists():
        raise ConfigurationError(
            f"--resume_from_checkpoint {given}: no checkpoint there; give a checkpoint-N folder, "
            "or true for the last one in --output_dir"
        )
    return given
