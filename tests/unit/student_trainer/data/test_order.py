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
