"""A run that trains is seen by a report before its first checkpoint."""

import json

from student_trainer.commands.main import main
from student_trainer.reporting.runs import LIVE_FILE, find_runs
from student_trainer.training.live_log import LiveLog


def test_the_log_can_be_read_while_the_run_trains(unserved_world, tmp_path, monkeypatch):
    seen = []
    remove = LiveLog.remove

    def look(callback):
        seen.extend(find_runs([tmp_path / "out"]).training)
        remove(callback)

    monkeypatch.setattr(LiveLog, "remove", look)
    flags = {
        "model_name_or_path": unserved_world.student, "dataset_name": unserved_world.rows,
        "output_dir": tmp_path / "out", "max_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    assert main(["sft", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    (training,) = seen
    (ended,) = find_runs([tmp_path / "out"]).training
    assert training.history == ended.history
    assert [step for step, _ in training.points("train/loss")] == [1, 2, 3]
    assert training.logged is not None
    assert (training.max_steps, ended.max_steps, ended.logged) == (3, 3, None)
    assert not (tmp_path / "out" / LIVE_FILE).exists()
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
