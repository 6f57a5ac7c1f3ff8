"""Completions, prompts, steps and tokens at servers are counted by a run's flags."""

from dataclasses import dataclass

import pytest

from shared.errors import ConfigurationError
from student_trainer.config.arguments import DivergenceFlags
from student_trainer.data.order import TrainingOrder
from student_trainer.training.counting import (
    completions_of_step,
    order_of,
    rows_of,
    rows_of_run,
    tokens_in_flight_of,
)


@dataclass
class Arguments(DivergenceFlags):
    """The flags that are counted by, without a Trainer."""

    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 3
    world_size: int = 2
    process_index: int = 0
    seed: int = 3
    data_seed: int | None = None
    dataloader_drop_last: bool = False
    max_steps: int = -1
    num_train_epochs: float = 1.0


def test_a_batch_counts_completions_and_the_rows_are_their_prompts():
    args = Arguments(lmbda=1.0, num_generations=6)
    assert completions_of_step(args) == 24
    rows = rows_of([None] * 30, args)
    assert (rows.count, rows.each_step, rows.steps_an_epoch) == (30, 4, 8)
    assert [rows.drawn(steps) for steps in (1, 7, 8, 9)] == [4, 28, 30, 34]


def test_a_rank_learns_the_rows_of_its_places():
    ranks = [Arguments(lmbda=1.0, num_generations=6, process_index=rank) for rank in range(2)]
    learned = [rows_of_run(args, order_of(30, args, repeats=6)) for args in ranks]
    assert sorted({row for rows in learned for row in rows}) == list(range(30))
    once = Arguments(max_steps=1, world_size=1, data_seed=8)
    order = TrainingOrder(30, 4, 3, seed=8)
    drawn = sorted(row for rows in order.micro_batches(0) for row in rows)
    assert rows_of_run(once, order_of(30, once, repeats=1)) == drawn


def test_processes_share_the_tokens_in_flight():
    assert tokens_in_flight_of(Arguments(), 99) is None
    assert tokens_in_flight_of(Arguments(rollout_max_tokens_in_flight=201), 100) == 100
    with pytest.raises(
        ConfigurationError,
        match=r"flight 199: a prompt and its completion have up to 100 tokens in each of 2 "
        r"processes; give 200 or more, or lower --max_new_tokens or --max_length",
    ):
        tokens_in_flight_of(Arguments(rollout_max_tokens_in_flight=199), 100)
