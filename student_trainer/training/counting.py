"""The rows of a run's steps and the steps of its epochs, by its flags."""

from __future__ import annotations

import math

from shared.errors import ConfigurationError
from student_trainer.config.arguments import divergence_flags_of
from student_trainer.config.training_arguments import CommonTrainingArguments
from student_trainer.data.order import TrainingOrder
from student_trainer.data.sample import Example
from student_trainer.data.stream import ExampleStream
from student_trainer.training.model_card import TrainingRows


def order_of(rows: int, args: CommonTrainingArguments, *, repeats: int) -> TrainingOrder:
    """Return the order in which this rank learns so many rows, each so often in a step."""
    seed = args.data_seed
    return TrainingOrder(
        rows,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        seed=args.seed if seed is None else seed,
        rank=args.process_index,
        world=args.world_size,
        drop_last=args.dataloader_drop_last,
        repeats=repeats,
    )


def completions_of_step(args: CommonTrainingArguments) -> int:
    """Return the completions that all processes together learn in a step."""
    local = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return local * args.world_size


def tokens_in_flight_of(args: CommonTrainingArguments, longest: int) -> int | None:
    """Return a process's share of ``--rollout_max_tokens_in_flight``, or None without it.

    Raises:
        ConfigurationError: a prompt and its completion may have ``longest`` tokens, which is more.
    """
    most = divergence_flags_of(args).rollout_max_tokens_in_flight
    if most is None:
        return None
    if most // args.world_size < longest:
        each = f" in each of {args.world_size} processes" if args.world_size > 1 else ""
        raise ConfigurationError(
            f"--rollout_max_tokens_in_flight {most}: a prompt and its completion have up to "
            f"{longest} tokens{each}; give {longest * args.world_size} or more, or lower "
            "--max_new_tokens or --max_length"
        )
    return most // args.world_size


def rows_of(train: list[Example] | ExampleStream, args: CommonTrainingArguments) -> TrainingRows:
    """Return how many rows there are, a step has, and how many steps make an epoch."""
    epoch, repeats = None, divergence_flags_of(args).num_generations
    if not isinstance(train, ExampleStream):
        epoch = order_of(len(train), args, repeats=repeats).steps_per_epoch
    return TrainingRows(len(train), completions_of_step(args) // repeats, epoch)


def rows_of_run(args: CommonTrainingArguments, order: TrainingOrder) -> list[int]:
    """Return the numbers of the rows that this rank learns."""
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * order.steps_per_epoch)
    taken = (order.micro_batches(step) for step in range(min(steps, order.steps_per_epoch)))
    places = {place for micro_batches in taken for places in micro_batches for place in places}
    return sorted({place // order.repeats for place in places})
