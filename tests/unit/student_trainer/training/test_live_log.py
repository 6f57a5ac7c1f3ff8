"""The file of a run's log: what it holds after a start, a resumption, the end and an error."""

import json
import logging

from transformers import TrainerControl, TrainerState, TrainingArguments

from student_trainer.reporting.runs import LIVE_FILE, find_runs
from student_trainer.training.live_log import LiveLog


def log(callback, folder, *entries, before=(), process_zero=True):
    state = TrainerState(max_steps=40, log_history=list(before), is_world_process_zero=process_zero)
    for entry in entries:
        state.log_history.append(entry)
        callback.on_log(TrainingArguments(folder, use_cpu=True), state, TrainerControl())


def lines(folder):
    return [json.loads(line) for line in (folder / LIVE_FILE).read_text().splitlines()]


def test_each_entry_is_a_line_after_the_number_of_steps(tmp_path):
    log(LiveLog(tmp_path / "out"), tmp_path, {"step": 1, "loss": 2.0}, {"step": 10, "loss": 1.0})
    assert lines(tmp_path / "out") == [
        {"max_steps": 40},
        {"step": 1, "loss": 2.0},
        {"step": 10, "loss": 1.0},
    ]
    (run,) = find_runs([tmp_path / "out"]).training
    assert (run.points("train/loss"), run.max_steps) == ([(1.0, 2.0), (10.0, 1.0)], 40)
    assert run.logged is not None


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
    one, two, three = ({"step": step, "loss": 1.0} for step in (1, 10, 20))
    log(LiveLog(tmp_path), tmp_path, one, two, three)
    log(LiveLog(tmp_path), tmp_path, {"step": 15, "loss": 0.5}, before=[one, two])
    assert [line["step"] for line in lines(tmp_path)[1:]] == [1, 10, 15]


def test_one_process_writes_and_the_end_removes(tmp_path):
    callback = LiveLog(tmp_path)
    log(callback, tmp_path, {"step": 1}, process_zero=False)
    callback.remove()
    assert not (tmp_path / LIVE_FILE).exists()
    log(callback, tmp_path, {"step": 1})
    callback.remove()
    assert not (tmp_path / LIVE_FILE).exists()


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / LIVE_FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        log(LiveLog(tmp_path), tmp_path, {"step": 1}, {"step": 2})
    (record,) = caplog.records
    assert str(tmp_path / LIVE_FILE) in record.message
