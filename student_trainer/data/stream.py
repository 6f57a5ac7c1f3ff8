"""The streaming of datasets that do not fit in memory: rows are read and tokenized during the run.

All ranks read the same endless stream of rows, and each tokenizes its share. The example at an
index depends only on rows, seed and number of ranks, so a checkpoint keeps three numbers: a resumed
run skips the rows before that place without tokenizing them, and continues bit for bit.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, overload

from shared.errors import ConfigurationError, DatasetError, RowTooLongError
from student_trainer.data.rows import Row, no_rows
from student_trainer.data.sample import Example

logger = logging.getLogger(__name__)

_MAX_CONSECUTIVE_SKIPS = 10_000  # after so many rows that are too long, the run ends


@dataclass(frozen=True)
class RowStream:
    """An endless stream of the rows of one or several datasets, shuffled within a buffer.

    Attributes:
        names: names of the datasets, for messages.
        sources: functions that each start reading a dataset from its first row.
        weights: probability with which the next row is drawn from each dataset; None to read one
            dataset after another.
        seed: seed of these draws and of the order within the buffer.
        buffer_size: rows in the buffer that the next one is drawn from.
    """

    names: Sequence[str]
    sources: Sequence[Callable[[], Iterator[Row]]]
    weights: Sequence[float] | None
    seed: int
    buffer_size: int

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows, pass after pass.

        Raises:
            DatasetError: a dataset is empty, or a row cannot be read.
        """
        if self.weights is None:
            yield from self._shuffled(" and ".join(self.names), self.sources, 0, self.buffer_size)
            return
        total = sum(self.weights)
        sizes = [max(1, round(self.buffer_size * weight / total)) for weight in self.weights]
        parts = [
            self._shuffled(name, [source], number, size)
            for number, (name, source, size) in enumerate(
                zip(self.names, self.sources, sizes, strict=True)
            )
        ]
        draws = random.Random(f"{self.seed} draws")
        while True:
            (part,) = draws.choices(parts, self.weights)
            yield next(part)

    def head(self, count: int) -> list[Row]:
        """Return the first rows of each dataset, unshuffled.

        Raises:
            DatasetError: a dataset is empty.
        """
        rows: list[Row] = []
        for name, source in zip(self.names, self.sources, strict=True):
            first = [row for row, _ in zip(source(), range(count), strict=False)]
            if not first:
                raise no_rows(name)
            rows += first
        return rows

    def _shuffled(
        self, name: str, sources: Sequence[Callable[[], Iterator[Row]]], number: int, size: int
    ) -> Iterator[Row]:
        """Yield the rows of pass after pass, each pass complete and in its own order."""
        passes = 0
        while True:
            order = random.Random(f"{self.seed} {number} {passes}")
            buffer: list[Row] = []
            for row in chain.from_iterable(source() for source in sources):
                if len(buffer) < size:
                    buffer.append(row)
                    continue
                place = order.randrange(size)
                buffer[place], row = row, buffer[place]
                yield row
            if not buffer:
                raise no_rows(name)
            order.shuffle(buffer)
            while buffer:
                yield buffer.pop()
            passes += 1


@dataclass(frozen=True)
class _Origin:
    """The origin of an example: the number of its row, and its own number within the row."""

    row: int
    turn: int


class ExampleStream(Sequence[Example]):
    """A sequence of the examples of one rank, tokenized on access; past ones can be dropped.

    Args:
        rows: the same on every rank; this rank takes every ``world``-th.
        make: returns the examples of (number, where, row); raises `RowTooLongError`.
        length: number of examples that the run takes, over all ranks.
        skip: leave out rows that are too long, and log how many.
    """

    def __init__(
        self,
        rows: RowStream,
        make: Callable[[int, str, dict[str, Any]], list[Example]],
        *,
        length: int,
        skip: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows, self._make, self._length, self._skip = rows, make, length, skip
        self._rank, self._world = rank, world
        self._check: Callable[[Example], None] | None = None
        self._begin(0, _Origin(0, 0))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return the example at an index of this rank's sequence.

        Raises:
            DatasetError: names a row that cannot be read or learned.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        while self._next <= index:
            self._take_row()
        return self._kept[index][0]

    def check_each(self, check: Callable[[Example], None]) -> None:
        """Call ``check`` with each example when its row is read, and with those that are kept.

        Raises: whatever ``check`` raises, here and where an example is taken.
        """
        self._check = check
        for example, _ in self._kept.values():
            check(example)

    def forget(self, before: int) -> None:
        """Drop the examples before an index, which are not needed again."""
        for position in [position for position in self._kept if position < before]:
            del self._kept[position]

    def state(self, position: int) -> dict[str, Any]:
        """Return the state from which `restore` continues at the example ``position``."""
        self[position]
        return {"position": position, **asdict(self._kept[position][1]), "of": self._settings()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ConfigurationError: the state is of a run with other rows, order or processes.
        """
        settings = self._settings()
        for name, value in settings.items():
            if state["of"].get(name) != value:
                raise ConfigurationError(
                    f"the checkpoint is of a --streaming run with {name} {state['of'].get(name)}, "
                    f"and this one has {value}: resume with the same, or begin anew"
                )
        self._begin(state["position"], _Origin(state["row"], state["turn"]))

    def _settings(self) -> dict[str, Any]:
        weights = self._rows.weights
        return {
            "dataset_name": list(self._rows.names),
            "dataset_weights": None if weights is None else list(weights),
            "seed": self._rows.seed,
            "shuffle_buffer_size": self._rows.buffer_size,
            "processes": self._world,
        }

    def _begin(self, position: int, place: _Origin) -> None:
        self._next = position
        self._kept: dict[int, tuple[Example, _Origin]] = {}
        self._source = enumerate(self._rows)
        self._from = place
        self._left_out = self._read = 0
        self._consecutive_skips = 0

    def _take_row(self) -> None:
        """Tokenize this rank's next row that is not left out, and keep its examples."""
        for number, (where, row) in self._source:
            if number % self._world != self._rank or number < self._from.row:
                continue
            self._read += 1
            try:
                examples = self._make(number, where, row)
            except RowTooLongError as error:
                if not self._skip:
                    raise
                self._leave_out(error)
                continue
            self._consecutive_skips = 0
            for turn, example in enumerate(examples):
                if self._check is not None:
                    self._check(example)
                if number > self._from.row or turn >= self._from.turn:
                    self._kept[self._next] = example, _Origin(number, turn)
                    self._next += 1
            return

    def _leave_out(self, error: RowTooLongError) -> None:
        self._left_out += 1
        if self._left_out.bit_count() == 1:  # log at 1, 2, 4, 8, …
            logger.warning(
                "%d of %d rows so far are left out: too long (%s)",
                self._left_out,
                self._read,
                error,
            )
        self._consecutive_skips += 1
        if self._consecutive_skips == _MAX_CONSECUTIVE_SKIPS:
            raise DatasetError(
                f"{_MAX_CONSECUTIVE_SKIPS} rows in a row are too long. The last one: {error}"
            )


class StreamOrder:
    """The order of an `ExampleStream`: each step takes the next examples."""

    def __init__(self, batch_size: int, accumulation: int, steps: int) -> None:
        self._batch_size, self._accumulation = batch_size, accumulation
        self.steps_per_epoch = steps

    def last_of_epoch(self, step: int) -> int:
        """Return the last step of the run, which is one epoch."""
        return self.steps_per_epoch - 1

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the example indices of each of the step's micro-batches on this rank."""
        size = self._batch_size
        first = self.first_of(step)
        return [
            list(range(first + number * size, first + (number + 1) * size))
            for number in range(self._accumulation)
        ]

    def first_of(self, step: int) -> int:
        """Return the index of a step's first example."""
        return step * self._accumulation * self._batch_size


def save_state(folder: str, rank: int, state: dict[str, Any]) -> None:
    """Write a rank's stream state into a checkpoint folder."""
    _state_file(folder, rank).write_text(json.dumps(state), encoding="utf-8")


def load_state(folder: str, rank: int) -> dict[str, Any]:
    """Return the stream state that `save_state` wrote.

    Raises:
        ConfigurationError: the checkpoint has none for this rank.
    """
    file = _state_file(folder, rank)
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{folder} keeps no place in a stream for process {rank}: it is of a run without "
            "--streaming, or with fewer processes; resume with the same flags"
        ) from error
    return state


def _state_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stream-{rank}.json"
