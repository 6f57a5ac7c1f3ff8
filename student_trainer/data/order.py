"""The order of training: the rows of each optimizer step, a function of seed, step and rank.

So the trainer can look any number of steps ahead, across epochs too, and a resumed run continues
where it stopped.
"""

from __future__ import annotations

import torch


class TrainingOrder:
    """A shuffled order of the rows, new in each epoch, exactly as accelerate's data loader has it.

    Args:
        rows: number of rows in the dataset.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches in a step; an epoch's last step has the rest.
        seed: seed of the order.
        rank, world: index of this process and number of processes. With several, the epoch's last
            batches are filled up from its first rows, so that all ranks have equally many.
        drop_last: leave out an epoch's last rows where they make no full batch on every rank.
        repeats: times that each row comes, one after another; batches count all of them.

    Attributes:
        repeats: as given.
        steps_per_epoch: optimizer steps of an epoch.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        accumulation: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        repeats: int = 1,
    ) -> None:
        self._rows = rows
        self.repeats = repeats
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._seed = seed
        self._rank, self._world = rank, world
        self._drop_last = drop_last
        over, all_rows = batch_size * world, rows * repeats
        # Of an epoch, on each rank.
        batches = all_rows // over if drop_last else -(-all_rows // over)
        self.steps_per_epoch = -(-batches // accumulation)
        self._batches = batches
        self._epoch: tuple[int, list[int]] = (-1, [])

    def last_of_epoch(self, step: int) -> int:
        """Return the last step of the epoch that ``step`` is in."""
        return (step // self.steps_per_epoch + 1) * self.steps_per_epoch - 1

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the places of each of the step's micro-batches on this rank.

        A place is row · repeats + repeat, so with one repeat it is the row's number.
        """
        epoch, step = divmod(step, self.steps_per_epoch)
        order = self._permutation(epoch)
        first = step * self._accumulation
        size = self._batch_size
        return [
            order[batch * size : (batch + 1) * size]
            for batch in range(
                first * self._world + self._rank,
                min(first + self._accumulation, self._batches) * self._world,
                self._world,
            )
        ]

    def _permutation(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            rows: list[int] = torch.randperm(self._rows, generator=generator).tolist()
            many = self.repeats
            order = [place for row in rows for place in range(row * many, (row + 1) * many)]
            wanted = self._batches * self._batch_size * self._world
            while self._world > 1 and len(order) < wanted:
                order += order[: wanted - len(order)]
            self._epoch = (epoch, order)
        return self._epoch[1]
