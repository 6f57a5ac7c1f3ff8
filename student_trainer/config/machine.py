"""The checks of flags against this machine's GPUs, packages and launcher, by torch."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from shared.errors import ConfigurationError
from student_trainer.config.arguments import (
    Recipe,
    TeacherArguments,
    divergence_flags_of,
    uses_fsdp,
)
from student_trainer.config.training_arguments import (
    CommonTrainingArguments,
    checkpoint_of,
)

# Packages to install for --report_to that have another name than the integration.
_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_machine(
    recipe: Recipe, args: CommonTrainingArguments, teacher: TeacherArguments | None = None
) -> None:
    """Check flags against this machine, before a teacher is waited for.

    Raises:
        ConfigurationError: something that a flag needs is missing.
    """
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"{args.n_gpu} GPUs are visible to one process; start one process a GPU with "
            "`accelerate launch -m student_trainer …`, or set CUDA_VISIBLE_DEVICES to one"
        )
    if recipe.adapters.load_in_4bit:
        if not torch.cuda.is_available():
            raise ConfigurationError("--load_in_4bit needs a CUDA GPU; drop it to train on a CPU")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigurationError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    loader: Any = args.accelerator_config
    if loader.split_batches or loader.dispatch_batches or not loader.even_batches:
        raise ConfigurationError(
            "--accelerator_config: split_batches, dispatch_batches and even_batches have no "
            "effect here; drop them"
        )
    if args.fp16 and not torch.accelerator.is_available():
        raise ConfigurationError("--fp16 needs a GPU; use --bf16, or neither")
    if (
        args.loss_kernel == "triton"
        and not torch.cuda.is_available()
        and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        raise ConfigurationError("--loss_kernel triton needs a GPU; use auto or torch")
    if teacher is not None and args.world_size > 1 and teacher.teacher_timeout >= args.ddp_timeout:
        raise ConfigurationError(
            f"--teacher_timeout {teacher.teacher_timeout:g}: processes wait {args.ddp_timeout} s "
            "for one another, and would be ended before one of them gives its teacher up; raise "
            "--ddp_timeout above it"
        )
    rollouts = divergence_flags_of(args)
    if (
        rollouts.rollout_url
        and args.world_size > 1
        and rollouts.rollout_timeout >= args.ddp_timeout
    ):
        raise ConfigurationError(
            f"--rollout_timeout {rollouts.rollout_timeout:g}: processes wait {args.ddp_timeout} s "
            "for one another, and would be ended before the first gives its rollout servers up; "
            "raise --ddp_timeout above it"
        )
    if rollouts.vllm_enable_sleep_mode and not torch.accelerator.is_available():
        raise ConfigurationError("--vllm_enable_sleep_mode frees memory of a GPU; drop it on a CPU")
    _check_reports(args)
    _check_fsdp(args)
    _check_zero3(args)
    checkpoint_of(args)


def _check_reports(args: CommonTrainingArguments) -> None:
    available = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigurationError(
                f"--report_to {name} is not one of {', '.join(INTEGRATION_TO_CALLBACK)} or none"
            )
        if name not in available:
            raise ConfigurationError(
                f"--report_to {name} is not installed here: pip install "
                f"{_PACKAGES.get(name, name)}. There is {', '.join(available)} or none"
            )


def _check_zero3(args: CommonTrainingArguments) -> None:
    if args.deepspeed_plugin is None:
        return
    zero = args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigurationError(
            "--deepspeed: under ZeRO-3 --output_dir would hold no model but DeepSpeed's own parts; "
            'set "stage3_gather_16bit_weights_on_model_save": true in its "zero_optimization", or '
            "zero3_save_16bit_model: true for accelerate"
        )


def _check_fsdp(args: CommonTrainingArguments) -> None:
    if args.fsdp and args.world_size == 1:
        raise ConfigurationError("--fsdp shards over several processes; start them with torchrun")
    if args.world_size == 1 or not uses_fsdp(args):
        return
    # transformers uses version 2 by default, and accelerate version 1.
    version = args.fsdp_config.get("version", 2) if args.fsdp else os.getenv("FSDP_VERSION", "1")
    if int(version) != 2:
        raise ConfigurationError(
            f"--fsdp: version {version} is not supported, whose wrappers rollouts go round; set "
            "--fsdp_config '{\"version\": 2}', or fsdp_version: 2 for accelerate"
        )
