"""The rows of each step of a run, from a list in memory or from a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from student_trainer.config.training_arguments import CommonTrainingArguments
from student_trainer.data.generations import Generations
from student_trainer.data.order import TrainingOrder
from student_trainer.data.sample import Example
from student_trainer.data.stream import ExampleStream, StreamOrder, load_state, save_state
from student_trainer.training.counting import order_of


class StepRows:
    """The examples that this rank learns in each step, known for all steps.

    Args:
        examples: a list, a stream, or `Generations` of either.
        args: of the run.

    Attributes:
        order: the order in which they are learned.
        stream: the examples, where they are not all in memory; None otherwise.
    """

    def __init__(self, examples: Sequence[Example], args: CommonTrainingArguments) -> None:
        self._examples = examples
        self._repeats = examples.each if isinstance(examples, Generations) else 1
        rows = examples.examples if isinstance(examples, Generations) else examples
        self.stream = rows if isinstance(rows, ExampleStream) else None
        self.order: TrainingOrder | StreamOrder
        if self.stream is None:
            self.order = order_of(len(rows), args, repeats=self._repeats)
        else:
            size, substeps = args.per_device_train_batch_size, args.gradient_accumulation_steps
            self.order = StreamOrder(size, substeps, args.max_steps)

    def micro_batches(self, step: int) -> list[list[Example]]:
        """Return the examples of each of the step's micro-batches."""
        return [[self._examples[i] for i in some] for some in self.order.micro_batches(step)]

    def of(self, step: int) -> list[Example]:
        """Return all examples of the step."""
        return [example for micro_batch in self.micro_batches(step) for example in micro_batch]

    def last_of_epoch(self, step: int) -> int:
        """Return the last step of the epoch that ``step`` is in."""
        return self.order.last_of_epoch(step)

    def forget_before(self, step: int) -> None:
        """Drop what a stream keeps of the steps before, which are not needed again."""
        if self.stream is not None:
            self.stream.forget(before=self._first_row(step))

    def save(self, folder: Path, rank: int, step: int) -> None:
        """Write the place in a stream at which ``step`` begins into a checkpoint."""
        if self.stream is not None:
            save_state(str(folder), rank, self.stream.state(self._first_row(step)))

    def restore(self, folder: str, rank: int) -> None:
        """Go to the place in a stream that `save` wrote.

        Raises:
            ConfigurationError: the checkpoint has none, or is of other rows, order or processes.
        """
        if self.stream is not None:
            self.stream.restore(load_state(folder, rank))

    def _first_row(self, step: int) -> int:
        return self.order.micro_batches(step)[0][0] // self._repeats
