"""Notes on the dataset's completions are told where these are learned, and not elsewhere."""

import logging

import pytest

from student_trainer.data.sample import Example
from student_trainer.data.turn import EMPTY_THOUGHT
from student_trainer.training.examples import _warn_of_losses
from tests.unit.student_trainer.pipeline.test_pipeline import example


@pytest.mark.parametrize("learned", [True, False])
def test_empty_thoughts_are_told_only_where_they_are_learned(caplog, learned):
    one = example(0)
    noted = Example(0, "row 0", one.prompt_ids, one.sample, None, "text", (EMPTY_THOUGHT,))
    with caplog.at_level(logging.WARNING):
        _warn_of_losses([{}], [noted], 64, learned=learned)
    assert ("begin with an empty thought" in caplog.text) == learned
