"""The checks of which datasets are read, and how."""

from __future__ import annotations

from shared.errors import ConfigurationError
from student_trainer.config.arguments import DataArguments, DatasetArguments, TrainingFlags
from student_trainer.config.checks.presence import require


def check_datasets(dataset: DatasetArguments, data: DataArguments, args: TrainingFlags) -> None:
    """Check the names and weights of datasets, and how they are read.

    Raises:
        ConfigurationError: one of them cannot work.
    """
    names, weights = dataset.dataset_name, data.dataset_weights
    require("".join(names), "--dataset_name", "a file, a folder, a glob or a Hub id")
    if not all(names):
        raise ConfigurationError("--dataset_name holds an empty name; drop it")
    if weights is not None:
        given = f"--dataset_weights {' '.join(f'{weight:g}' for weight in weights)}"
        if len(names) == 1:
            raise ConfigurationError(
                f"{given} has no effect on one dataset; drop it, or give several --dataset_name"
            )
        if len(weights) != len(names):
            raise ConfigurationError(
                f"{given}: {len(weights)} weights for {len(names)} datasets; give one for each"
            )
        if not all(0 < weight < float("inf") for weight in weights):
            raise ConfigurationError(
                f"{given}: each must be above 0; leave out a dataset that is not wanted"
            )
    for name in ("dataset_num_proc", "shuffle_buffer_size"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name} {value} must be at least 1")
    if data.prompt_column == data.completion_column:
        raise ConfigurationError(
            f"--prompt_column and --completion_column are both {data.prompt_column}; the "
            "completion must be a column of its own"
        )
    if not data.streaming:
        if data.shuffle_buffer_size is not None:
            raise ConfigurationError(
                f"--shuffle_buffer_size {data.shuffle_buffer_size} has no effect without "
                "--streaming: all rows are shuffled; drop it"
            )
        return
    if args.max_steps <= 0:
        raise ConfigurationError(
            "--streaming needs --max_steps: how many rows there are is not known beforehand"
        )
    if data.dataset_num_proc is not None:
        raise ConfigurationError(
            f"--dataset_num_proc {data.dataset_num_proc} has no effect with --streaming, which "
            "tokenizes rows as they come; drop it"
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ConfigurationError(
                f"--{name} epoch: with --streaming the run has no epochs; use steps"
            )
