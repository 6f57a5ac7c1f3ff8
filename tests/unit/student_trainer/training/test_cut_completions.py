"""Most completions reach the limit: one warning."""

import logging

from transformers import TrainerControl, TrainerState, TrainingArguments

from student_trainer.training.cut_completions import CutCompletions


def log(callback, tmp_path, step, logs):
    state = TrainerState(global_step=step, is_world_process_zero=True)
    callback.on_log(TrainingArguments(tmp_path, use_cpu=True), state, TrainerControl(), logs=logs)


def test_it_is_said_once_when_most_are_cut(tmp_path, caplog):
    callback = CutCompletions(64)
    with caplog.at_level(logging.WARNING):
        log(callback, tmp_path, 1, {"train/truncated": 0.5})
        log(callback, tmp_path, 1, {"eval/divergence": 1.0})
        assert not caplog.records
        log(callback, tmp_path, 2, {"train/truncated": 0.75})
        log(callback, tmp_path, 3, {"train/truncated": 1.0})
    [record] = caplog.records
    assert record.message.startswith(
        "step 2: 75% of the completions are cut at --max_new_tokens 64"
    )
