"""Averages of a window: over tokens, completions or steps, and over all ranks."""

import numpy as np
import pytest
import torch

from student_trainer.data.sample import Sample
from student_trainer.losses import SparseStatistics
from student_trainer.training.metrics import WindowMetrics


def sample(length, truncated=False, version=None):
    ids = np.zeros(length + 1, np.uint32)
    return Sample(ids, 1, np.ones(length, bool), "student", truncated, version)


def statistics(*divergences):
    column = torch.tensor(divergences)
    return SparseStatistics(
        column, column / 2, column / 4, column * 2, column * 3, column * 0, column * 5, column * 6
    )


def filled():
    window = WindowMetrics()
    window.add_step([sample(2, version=4), sample(4, True, version=3)], step=5, on_policy=True)
    window.add_step([sample(6)], step=6, on_policy=False)
    window.add_inputs(positions=12, tokens=9)
    window.add_inputs(positions=8, tokens=7)
    window.add_statistics(statistics(0.2, 0.4))
    window.add_statistics(statistics(0.9))
    window.add_seconds("teacher", 3.0)
    window.add_seconds("forward_backward", 5.0)
    window.add_seconds("step", 2.0)  # the rest of it
    window.add("bytes", 600)
    window.add("scored_tokens", 3)
    return window


def test_each_average_is_over_what_it_is_of():
    logs = filled().drain(lambda values: values, with_teacher=True)
    assert logs["divergence"] == pytest.approx(0.5)
    assert logs["teacher_top_k_mass"] == pytest.approx(0.25)
    assert logs["student_entropy"] == pytest.approx(1.5)
    assert logs["completion_length"] == pytest.approx(4.0)
    assert logs["truncated"] == pytest.approx(1 / 3)
    assert logs["padding_fraction"] == pytest.approx(4 / 20)
    assert logs["on_policy"] == 0.5
    assert logs["seconds_teacher"] == 1.5
    assert logs["seconds_step"] == 5.0
    assert logs["stall_fraction"] == pytest.approx(0.3)
    assert logs["bytes_per_token"] == 200
    assert logs["teacher_tokens_per_second"] == pytest.approx(0.3)


def test_staleness_is_of_the_students_completions_alone():
    logs = filled().drain(lambda values: values, with_teacher=True)
    assert logs["staleness"] == 1.5
    assert logs["staleness_max"] == 2
    window = filled()
    window.drain(lambda values: values, with_teacher=True)
    window.add_step([sample(6)], step=7, on_policy=False)
    window.add_inputs(positions=8, tokens=7)
    window.add_statistics(statistics(0.2))
    assert "staleness" not in window.drain(lambda values: values, with_teacher=True)


def test_sums_are_added_over_ranks_before_dividing():
    alone = filled().drain(lambda values: values, with_teacher=True)
    alone["teacher_tokens_per_second"] *= 2  # two ranks have two streams of answers
    assert filled().drain(lambda values: 2 * values, with_teacher=True) == alone


def test_a_drained_window_begins_anew():
    window = filled()
    window.drain(lambda values: values, with_teacher=True)
    assert window.drain(lambda values: values, with_teacher=True) == {}


def test_sft_logs_nothing_of_a_teacher():
    logs = filled().drain(lambda values: values, with_teacher=False)
    seconds = {"seconds_step", "seconds_forward_backward", "seconds_optimizer"}
    assert logs.keys() == {"completion_length", "truncated", "padding_fraction", *seconds}
