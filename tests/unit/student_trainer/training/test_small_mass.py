"""A teacher whose k tokens hold little of its probability: one warning, in the first window."""

import logging

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from student_trainer.training.small_mass import SmallMass


@pytest.mark.parametrize(("mass", "told"), [(0.0007, 1), (0.89, 1), (0.9, 0), (1.0, 0)])
def test_it_is_told_once_in_the_first_window(tmp_path, caplog, mass, told):
    caplog.set_level(logging.WARNING)
    callback, control = SmallMass(), TrainerControl()
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    for step, found in (
        (5, {}),
        (10, {"teacher/top_k_mass": mass}),
        (20, {"teacher/top_k_mass": 0.1}),
    ):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        callback.on_log(arguments, state, control, logs=found)
    assert len(caplog.records) == told
    for record in caplog.records:
        assert record.getMessage().startswith(f"step 10: teacher/top_k_mass {mass:.2g}: below 0.9")
        assert record.getMessage().endswith("raise --top_k_logprobs")


def test_other_processes_are_silent(tmp_path, caplog):
    state = TrainerState(global_step=1, is_world_process_zero=False)
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    SmallMass().on_log(arguments, state, TrainerControl(), logs={"teacher/top_k_mass": 0.1})
    assert not caplog.records
