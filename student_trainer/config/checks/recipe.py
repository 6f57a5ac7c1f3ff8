"""The checks of the flags that `sft` and `distill` share."""

from __future__ import annotations

import importlib.util
import logging

from shared.errors import ConfigurationError
from student_trainer.config.arguments import Recipe, TrainingFlags, traced_steps, uses_deepspeed
from student_trainer.config.checks.datasets import check_datasets
from student_trainer.config.checks.model import (
    check_adapters,
    check_generation,
    check_model,
    holds_adapters,
)
from student_trainer.config.trainer_flags import trainer_flags

logger = logging.getLogger(__name__)

_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_METRICS = ("loss", "divergence", "pass@1", "exact_match")
_NO_PREDICTIONS = "has no effect: evaluation gathers no predictions; drop it"
_NO_WORKERS = "is of worker processes, and rows need none: they are token ids in memory; drop it"
# Flags of transformers that have no effect here, or not the one that they promise.
UNSUPPORTED = {
    "label_smoothing_factor": "has no effect on a divergence; drop it",
    "use_liger_kernel": "replaces the forward pass; the loss here is fused already: drop it",
    "auto_find_batch_size": "would mix generation batches of two sizes; give the batch size",
    "dataloader_num_workers": "has no effect: rows are token ids in memory; drop it",
    "enable_jit_checkpoint": "is not needed: SIGTERM saves a checkpoint anyway; drop it",
    "ignore_data_skip": "would learn rows twice after a checkpoint; drop it",
    "bf16_full_eval": "has no effect: evaluation computes as training does; use --bf16",
    "fp16_full_eval": "has no effect: evaluation computes as training does; use --fp16",
    "train_sampling_strategy": "is not supported: the order is random, or fixed by --seed; drop it",
    "length_column_name": "has no effect: rows are not grouped by length; drop it",
    "label_names": "has no effect: what is learned is found in the rows' own columns; drop it",
    "average_tokens_across_devices": "has no effect: the loss is of all processes' tokens; drop it",
    "liger_kernel_config": "is of --use_liger_kernel, which is not supported; drop it",
    "parallelism_config": "is not supported: each process learns rows of its own; use --fsdp",
    "prediction_loss_only": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "dataloader_persistent_workers": _NO_WORKERS,
    "dataloader_prefetch_factor": _NO_WORKERS,
    "dataloader_multiprocessing_context": _NO_WORKERS,
    "dataloader_in_order": _NO_WORKERS,
    "do_train": "has no effect: this command always trains; drop it",
    "do_predict": "has no effect: `student-trainer evaluate` asks the trained model; drop it",
}


def check_recipe(recipe: Recipe, args: TrainingFlags) -> None:
    """Check the flags that `sft` and `distill` share.

    Raises:
        ConfigurationError: a value or a combination cannot work.
    """
    model, adapters, dataset, data = recipe.model, recipe.adapters, recipe.dataset, recipe.data
    if not args.output_dir:
        raise ConfigurationError("--output_dir is missing: give a folder for the trained model")
    if uses_deepspeed(args) and importlib.util.find_spec("deepspeed") is None:
        raise ConfigurationError("DeepSpeed is not installed here: pip install deepspeed")
    check_model(model)
    check_generation(recipe.generation)
    check_adapters(adapters)
    check_datasets(dataset, data, args)
    if args.unsafe_sandbox and not data.eval_dataset_name:
        raise ConfigurationError(
            "--unsafe_sandbox has no effect without --eval_dataset_name, whose programs it is for"
        )
    if adapters.use_peft and model.loaded is None and holds_adapters(model.model_name_or_path):
        raise ConfigurationError(
            f"--use_peft on {model.model_name_or_path}, which holds adapters itself: the new ones "
            "would name their base without these. First run `student-trainer merge "
            f"--model_name_or_path {model.model_name_or_path} --output_dir DIR`, and train on DIR"
        )
    if args.eval_strategy != "no" and not data.eval_dataset_name:
        raise ConfigurationError(f"--eval_strategy {args.eval_strategy} needs --eval_dataset_name")
    if args.do_eval and args.eval_strategy == "no":
        raise ConfigurationError(
            "--do_eval has no effect; say when: --eval_strategy steps or epoch"
        )
    if data.assistant_only_loss:
        logger.warning("--assistant_only_loss is the old name of --assistant_turns all")
    if data.max_length is not None and data.max_length < 2:
        raise ConfigurationError(f"--max_length {data.max_length} must be at least 2")
    for name in _COUNTS:
        if getattr(args, name) < 1:
            raise ConfigurationError(f"--{name} {getattr(args, name)} must be at least 1")
    budget = args.max_tokens_per_batch
    if budget is not None and budget < 1:
        raise ConfigurationError(f"--max_tokens_per_batch {budget} must be at least 1")
    if budget is not None and uses_deepspeed(args):
        raise ConfigurationError(
            f"--max_tokens_per_batch {budget}: DeepSpeed counts micro-batches by itself and would "
            "step between them; drop it"
        )
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in _METRICS:
        raise ConfigurationError(
            f"--metric_for_best_model {args.metric_for_best_model} is not one of "
            f"{', '.join(_METRICS)}"
        )
    for name, remedy in UNSUPPORTED.items():
        value = getattr(args, name)
        if value != trainer_flags()[name].default:
            given = " ".join(value) if isinstance(value, list) else value
            raise ConfigurationError(f"--{name} {given} {remedy}")
    traced_steps(args)
    if args.bf16 and args.fp16:
        raise ConfigurationError("--bf16 and --fp16 are two dtypes to compute in: give one of them")
    if args.nonfinite == "skip" and (args.fp16 or uses_deepspeed(args)):
        raise ConfigurationError(
            "--nonfinite skip: the loss scaler of --fp16 skips steps by itself, and so does "
            "DeepSpeed; drop it"
        )
    if args.loss_kernel == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigurationError("--loss_kernel triton: not installed; pip install triton")
