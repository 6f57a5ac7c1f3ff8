"""The checks of the model, its adapters, its generation, and of merging adapters into it."""

from __future__ import annotations

from pathlib import Path

from shared.errors import ConfigurationError
from shared.model_names import describe_missing, existing, models_below, near_path
from student_trainer.config.arguments import (
    AdapterArguments,
    GenerationArguments,
    MergeArguments,
    ModelArguments,
)
from student_trainer.config.checks.presence import check_needs, require


def check_model(model: ModelArguments) -> None:
    if model.loaded is not None:
        return
    require(model.model_name_or_path, "--model_name_or_path", "a folder or a Hub id")
    name = model.model_name_or_path
    folder = existing(name)
    if folder is not None and folder.is_dir():
        if not (folder / "config.json").exists() and not holds_adapters(name):
            raise ConfigurationError(
                f"--model_name_or_path {name} has no config.json{models_below(folder)}; give a "
                "model's folder"
            )
    elif missing := describe_missing(name):
        raise ConfigurationError(f"--model_name_or_path: {missing}; give a folder or a Hub id")


def holds_adapters(folder: str) -> bool:
    """Return whether a model folder holds LoRA adapters alone, without their base model."""
    path = Path(folder)
    return (path / "adapter_config.json").exists() and not (path / "config.json").exists()


def check_adapters(adapters: AdapterArguments) -> None:
    if adapters.load_in_4bit and not adapters.use_peft:
        raise ConfigurationError("--load_in_4bit trains adapters only: add --use_peft")
    check_needs(adapters)
    if adapters.lora_r < 1:
        raise ConfigurationError(f"--lora_r {adapters.lora_r} must be at least 1")


def check_generation(generation: GenerationArguments) -> None:
    if generation.max_new_tokens < 1:
        raise ConfigurationError(f"--max_new_tokens {generation.max_new_tokens} must be at least 1")
    if generation.generation_batch_size is not None and generation.generation_batch_size < 1:
        raise ConfigurationError(
            f"--generation_batch_size {generation.generation_batch_size} must be at least 1"
        )


def check_merge(args: MergeArguments) -> None:
    """Check the flags of `merge`.

    Raises:
        ConfigurationError: there is nothing to merge, or the output folder is in use.
    """
    require(args.model_name_or_path, "--model_name_or_path", "a folder of LoRA adapters")
    require(args.output_dir, "--output_dir", "a new folder for the merged model")
    if existing(args.model_name_or_path) is None:
        raise ConfigurationError(
            f"--model_name_or_path: folder {args.model_name_or_path} does not exist"
            f"{near_path(args.model_name_or_path)}; give a folder of LoRA adapters"
        )
    if not holds_adapters(args.model_name_or_path):
        raise ConfigurationError(
            f"--model_name_or_path {args.model_name_or_path} holds no LoRA adapters to merge"
            f"{models_below(Path(args.model_name_or_path))}"
        )
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output_dir {output} exists already; give a new folder")
