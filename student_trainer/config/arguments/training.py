"""The flags of training that need no teacher."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shared.errors import ConfigurationError
from student_trainer.config.flags import flag
from student_trainer.config.trainer_flags import TrainerFlags

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class RunFlags:
    """The trainer's own flags, and flags of transformers with another default."""

    output_dir: str | None = flag(
        None,
        "Folder for checkpoints, the final model and logs.",
        group="training",
        common=True,
        private=True,
    )
    overwrite_output_dir: bool = flag(
        False,
        "Replace the model and the checkpoints of an earlier run in --output_dir, which is refused "
        "without: they are deleted once this run's own model is loaded. With "
        "--resume_from_checkpoint auto a checkpoint that is there is gone on from.",
        group="training",
        private=True,
    )
    logging_first_step: bool = flag(True, "Log the first step.", group=None, private=True)
    logging_steps: float = flag(
        10,
        "Steps of a logging window, of which there is a line; below 1 a share of all steps. The "
        "last step ends one too.",
        group="evaluation and logs",
        private=True,
    )
    eval_steps: float | None = flag(
        None,
        "Steps between evaluations, with --eval_strategy steps; the last step has one too. "
        "Default: as --save_steps.",
        group="evaluation and logs",
    )
    remove_unused_columns: bool = flag(
        False, "Not used: rows become token ids here.", group=None, private=True
    )
    disable_tqdm: bool | None = flag(
        None,
        "A line for each log instead of a bar. Default: where there is no terminal.",
        group=None,
        private=True,
    )
    greater_is_better: bool | None = flag(
        None,
        "Whether more of --metric_for_best_model is better. Default: not of loss and divergence.",
        group=None,
    )
    loss_kernel: Literal["auto", "torch", "triton"] = flag(
        "auto",
        "Who computes the divergence: auto takes Triton on a GPU and PyTorch elsewhere; torch and "
        "triton force one.",
        group="memory and speed",
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "Regroup the samples of each optimizer step by length into the fewest micro-batches of at "
        "most so many tokens, padding included; a longer sample is alone. Default: as many as "
        "--per_device_train_batch_size in each.",
        group="memory and speed",
    )
    packing: Literal["auto", "on", "off"] = flag(
        "auto",
        "Sequences of a micro-batch end to end in one row, without padding, where the model is "
        "seen to give them the same logits. auto: with flash attention, otherwise padded; on: with "
        "any (other kernels pay with a mask over the whole row), or an error; off: padded.",
        group="memory and speed",
    )
    nonfinite: Literal["stop", "skip"] = flag(
        "stop",
        "What becomes of a step whose loss or gradient is NaN or infinite. stop: the run ends "
        "before the optimizer's step, with the batch in --output_dir. skip: the weights stay as "
        "they are, and the log counts train/skipped_steps.",
        group="training",
    )
    unsafe_sandbox: bool = flag(
        False,
        "Run model-written programs also where the kernel refuses a fence (seccomp, Landlock): "
        "they have your rights then. Default: an error that names it.",
        group="evaluation and logs",
    )
    trace_steps: str | None = flag(
        None,
        "N or N-M: write trace.json in --output_dir, what went on when in these steps, for "
        "https://ui.perfetto.dev.",
        group="evaluation and logs",
        private=True,
    )
    ddp_find_unused_parameters: bool | None = flag(
        False,
        "Only for models that leave parameters out of a step (mixtures of experts).",
        group=None,
    )
    dry_run: bool = flag(
        False,
        "Show what the run would do and need, and stop. It checks flags, data and teacher, shows "
        "four rows as they are learned and what the teacher says of them, and estimates memory and "
        "traffic. It loads no weights and writes nothing.",
        group="the command itself",
        common=True,
    )


@dataclass
class TrainingFlags(RunFlags, TrainerFlags):
    """The flags of training that `sft` and `distill` share."""


@dataclass
class SFTFlags(TrainingFlags):
    """The flags of `sft`: forward KL to the data's one-hot distribution, without a teacher."""


def traced_steps(args: RunFlags) -> tuple[int, int] | None:
    """Return the first and last step of ``--trace_steps``, counted from 1; None without it.

    Raises:
        ConfigurationError: it is not a range of steps.
    """
    if args.trace_steps is None:
        return None
    given = re.fullmatch(r"(\d+)(?:-(\d+))?", args.trace_steps)
    first, last = (int(given[1]), int(given[2] or given[1])) if given else (0, 0)
    if not 1 <= first <= last:
        raise ConfigurationError(
            f"--trace_steps {args.trace_steps} must be a step from 1, or a range such as 10-12"
        )
    return first, last


def uses_deepspeed(args: TrainingFlags | TrainingArguments) -> bool:
    """Return whether ``--deepspeed`` or accelerate's launcher turns DeepSpeed on."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def uses_fsdp(args: TrainingFlags | TrainingArguments) -> bool:
    """Return whether ``--fsdp`` or accelerate's launcher turns FSDP on."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
