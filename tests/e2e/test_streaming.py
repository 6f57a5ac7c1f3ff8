"""Runs on a stream, and on several datasets."""

import json

import pytest
from safetensors.torch import load_file

from student_trainer.api import distill
from student_trainer.commands.main import main


def sft(world, output, **options):
    options = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "output_dir": output,
        "report_to": "none", "streaming": "true", "max_steps": 8, "shuffle_buffer_size": 16,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "save_steps": 3, "learning_rate": 1e-3, **options,
    }  # fmt: skip
    return main(["sft", *(f"--{name}={value}" for name, value in options.items() if value)])


def losses(output):
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["train/loss"] for entry in state["log_history"] if "train/loss" in entry]


def test_a_resumed_stream_learns_what_an_uninterrupted_one_does(unserved_world, tmp_path):
    """48 rows, 8 in a step: the second pass begins in the seventh step."""
    assert sft(unserved_world, tmp_path / "whole") == 0
    assert len(set(losses(tmp_path / "whole"))) == 8
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = {"resume_from_checkpoint": checkpoint}
    assert sft(unserved_world, tmp_path / "again", **resumed) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    whole, again = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "again"))
    assert all(value.equal(again[name]) for name, value in whole.items())
    state = json.loads((checkpoint / "stream-0.json").read_text())
    assert (state["position"], state["row"]) == (24, 24)


def test_a_stream_is_not_gone_on_with_in_another_order(unserved_world, tmp_path, capsys):
    assert sft(unserved_world, tmp_path, max_steps=3) == 0
    resumed = {"resume_from_checkpoint": tmp_path / "checkpoint-3", "max_steps": 4}
    capsys.readouterr()
    assert sft(unserved_world, tmp_path, **resumed, shuffle_buffer_size=8) == 2
    assert "--shuffle_buffer_size 16 -> 8" in capsys.readouterr().err
    (tmp_path / "checkpoint-3" / "stream-0.json").unlink()
    assert sft(unserved_world, tmp_path, **resumed) == 2
    assert "keeps no place in a stream for process 0" in capsys.readouterr().err


def test_a_dry_run_looks_at_the_first_rows_of_a_stream(unserved_world, tmp_path, capsys):
    assert sft(unserved_world, tmp_path, dry_run="true") == 0
    out = capsys.readouterr().out
    assert "a stream, of which are seen 64 rows" in out
    assert "an epoch" not in out


def test_rows_in_memory_are_a_stream_too_unless_they_can_be_read_once(world, tmp_path):
    rows = [json.loads(line) for line in world.rows.read_text().splitlines()]
    options = {
        "lmbda": 0.5, "max_new_tokens": 4, "report_to": "none", "streaming": True, "max_steps": 3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "seq_kd": True,
    }  # fmt: skip
    told = distill(world.student, world.url, rows, output_dir=tmp_path, **options)
    assert told.history[-1]["step"] == 3
    with pytest.raises(Exception, match="that can be read once only"):
        distill(world.student, world.url, iter(rows), output_dir=tmp_path / "x", **options)


def test_datasets_are_mixed_by_their_weights(unserved_world, tmp_path, caplog):
    lines = unserved_world.rows.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:12]))
    (tmp_path / "b.jsonl").write_text("".join(lines[12:16]))
    command = [
        "sft", f"--model_name_or_path={unserved_world.student}", "--report_to=none",
        "--dataset_name",
        str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--dataset_weights", "2", "1",
        "--per_device_train_batch_size=6", "--num_train_epochs=1", "--logging_steps=1",
        f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert main(command) == 0
    assert "a.jsonl: 12 rows an epoch (66.7%), each of its 12 rows once" in caplog.text
    assert "b.jsonl: 6 rows an epoch (33.3%), each of its 4 rows once, 2 of them" in caplog.text
    assert len(losses(tmp_path / "out")) == 3  # 18 rows, 6 a step
    assert (
        "18 rows drawn from the 18 of `a.jsonl` and `b.jsonl`"
        in (tmp_path / "out/README.md").read_text()
    )
