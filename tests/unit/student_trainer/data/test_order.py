"""The order of the rows, against the loader that accelerate makes of the same dataset."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler

from student_trainer.data.order import TrainingOrder


def accelerates(rows, batch_size, seed, rank, world, drop_last, epochs):
    """Return the rows that transformers' Trainer would be handed, epoch by epoch."""
    data = list(range(rows))
    loader = prepare_data_loader(
        DataLoader(data, batch_size, sampler=RandomSampler(data), drop_last=drop_last,
                   collate_fn=list),
        num_processes=world, process_index=rank, put_on_device=False,
        use_seedable_sampler=True, data_seed=seed,
    )  # fmt: skip
    return [list(loader) for _ in range(epochs)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("rows", "batch_size", "world"), [(12, 3, 1), (13, 3, 1), (24, 4, 3), (25, 4, 2), (5, 2, 3)]
)
def test_rows_come_as_from_accelerates_loader(rows, batch_size, world, drop_last):
    if drop_last and rows < batch_size * world:
        return  # refused when the run starts
    for rank in range(world):
        expected = accelerates(rows, batch_size, 7, rank, world, drop_last, epochs=3)
        order = TrainingOrder(
            rows, batch_size, 2, seed=7, rank=rank, world=world, drop_last=drop_last
        )
        step = 0
        for epoch in expected:
            assert order.last_of_epoch(step) == step + order.steps_per_epoch - 1
            found = []
            for _ in range(order.steps_per_epoch):
                micro_batches = order.micro_batches(step)
                assert 1 <= len(micro_batches) <= 2
                found += micro_batches
                step += 1
            assert found == epoch


def test_any_step_can_be_asked_for_at_any_time():
    order = TrainingOrder(10, 3, 1, seed=0)
    forwards = [order.micro_batches(step) for step in range(12)]
    again = TrainingOrder(10, 3, 1, seed=0)
    assert [again.micro_batches(step) for step in reversed(range(12))] == forwards[::-1]
    torch.manual_seed(5)  # the state of the global generator plays no part
    assert order.micro_batches(0) == forwards[0]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulation", "world", "repeats"),
    [(12, 4, 1, 1, 4), (13, 4, 2, 1, 2), (10, 1, 4, 2, 4), (25, 4, 2, 2, 2), (5, 2, 3, 3, 6)],
)
def test_repeats_of_a_row_are_together_in_a_step(
    rows, batch_size, accumulation, world, repeats, drop_last
):
    ranks = [
        TrainingOrder(
            rows, batch_size, accumulation, seed=7, rank=rank, world=world, drop_last=drop_last,
            repeats=repeats,
        )
        for rank in range(world)
    ]  # fmt: skip
    once = TrainingOrder(rows, 1, 1, seed=7)
    loaders = [
        accelerates(rows * repeats, batch_size, 7, rank, world, drop_last, epochs=1)[0]
        for rank in range(world)
    ]
    steps = ranks[0].steps_per_epoch
    assert [-(-len(loader) // accumulation) for loader in loaders] == [steps] * world
    learned = []
    for step in range(steps):
        per_rank = [order.micro_batches(step) for order in ranks]
        assert len({len(micro_batches) for micro_batches in per_rank}) == 1
        # A step's micro-batches are dealt to the ranks in turn.
        dealt = [places for turn in zip(*per_rank, strict=True) for places in turn]
        places = [place for some in dealt for place in some]
        assert len(set(places)) == len(places) or step + 1 == steps  # filled up at the end
        whole = step + 1 < steps
        assert not whole or sorted(places) == sorted(
            row * repeats + number
            for row in {place // repeats for place in places}
            for number in range(repeats)
        )
        learned += places
    drawn = [place for step in range(rows) for [place] in once.micro_batches(step)]
    expected = [row * repeats + number for row in drawn for number in range(repeats)]
    assert learned[: len(expected)] == expected[: len(learned)]
    assert drop_last or len(learned) >= len(expected)
