"""The rows of a step are known for all steps, from memory and from a stream."""

import pytest

from shared.errors import ConfigurationError
from student_trainer.data.generations import Generations
from student_trainer.training.step_rows import StepRows
from tests.unit.student_trainer.data.test_stream import rows_of, stream
from tests.unit.student_trainer.training.test_counting import Arguments

ARGUMENTS = Arguments(max_steps=6, world_size=1)  # 3 micro-batches of 4 make a step


def streamed(repeats=1):
    examples = stream(rows_of(50))
    return StepRows(Generations(examples, repeats) if repeats > 1 else examples, ARGUMENTS)


def numbers(examples):
    return [(example.index, example.name, example.generation) for example in examples]


def test_an_epoch_has_every_row_in_micro_batches_of_the_right_size():
    rows = StepRows(list(stream(rows_of(50))[:24]), ARGUMENTS)
    assert [len(some) for some in rows.micro_batches(0)] == [4, 4, 4]
    assert len({name for step in (0, 1) for _, name, _ in numbers(rows.of(step))}) == 24
    assert rows.last_of_epoch(0) == rows.last_of_epoch(1) == 1
    assert rows.stream is None


@pytest.mark.parametrize("repeats", [1, 4])
def test_a_stream_goes_on_at_the_step_that_was_kept(tmp_path, repeats):
    whole = streamed(repeats)
    steps = [numbers(whole.of(step)) for step in range(4)]
    kept = streamed(repeats)
    kept.of(1)
    kept.save(tmp_path, 0, 2)
    resumed = streamed(repeats)
    resumed.restore(str(tmp_path), 0)
    assert [numbers(resumed.of(step)) for step in (2, 3)] == steps[2:]
    with pytest.raises(ConfigurationError, match="for process 1"):
        resumed.restore(str(tmp_path), 1)


def test_a_step_that_is_past_is_not_kept():
    rows = streamed()
    first = rows.of(0)
    rows.of(1)
    rows.forget_before(1)
    with pytest.raises(KeyError):
        rows.of(0)
    assert first
