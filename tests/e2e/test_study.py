"""A study of the trainer's own commands, with a served teacher."""

import json

import httpx
import pytest
import yaml

from student_trainer.commands.main import main


def test_a_teacher_is_served_once_for_its_cells_and_then_stopped(world, tmp_path, capsys):
    training = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "save_strategy": "no", "report_to": "none", "seed": "{seed}",
    }  # fmt: skip
    checker = {"kind": "exact_match", "answer": "1"}
    rows = [{"prompt": "one", "task_id": str(i), "checker": checker} for i in range(2)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "seeds": [3],
        "defaults": {
            "sft": training,
            "distill": {**training, "model_name_or_path": str(world.student), "max_new_tokens": 4},
        },
        "serve": {"backend": "transformers"},
        "cells": {
            "teacher": {
                "command": "sft",
                "flags": {
                    "model_name_or_path": str(world.teacher), "dataset_name": str(world.rows),
                },
            },
            "gkd": {
                "command": "distill",
                "teacher": "teacher",
                "flags": {"dataset_name": str(world.rows), "lmbda": 1.0},
                "grid": {"top_k_logprobs": [2, 8]},
            },
            "again": {
                "command": "evaluate",
                "flags": {"max_new_tokens": 4, "dataset_name": str(tmp_path / "held_out.jsonl")},
                "grid": {"model_name_or_path": ["{teacher}"]},
            },
        },
        "measure": {
            "command": "evaluate",
            "metric": "exact_match",
            "flags": {
                "model_name_or_path": "{model}", "max_new_tokens": 4,
                "dataset_name": str(tmp_path / "held_out.jsonl"),
            },
        },
        "tables": {
            "k": {"cells": ["gkd.*"], "x": "top_k_logprobs"},
            "again": {"cells": ["again.*"]},
        },
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    output = tmp_path / "out"
    code = main(["study", str(tmp_path / "study.yaml"), f"--output_dir={output}"])
    printed = capsys.readouterr()
    assert code == 0, printed.err

    (served,) = [line for line in printed.out.splitlines() if line.startswith("$ teacher-server")]
    port = int(served.split("--port ")[1].split()[0])
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    for k in (2, 8):
        made = json.loads((output / f"seed-3/gkd.{k}.done.json").read_text())
        assert f"--teacher_url=http://127.0.0.1:{port}" in made["command"]
        assert "--seed=3" in made["command"]
        assert (output / f"seed-3/gkd.{k}/model.safetensors").exists()
    results = json.loads((output / "results.json").read_text())
    assert results["metric"] == "exact_match"
    assert set(results["cells"]) == {"gkd.2", "gkd.8", "again.teacher"}
    assert (output / "k.svg").exists()

    # The port is another at every start: it is no part of what a cell is.
    assert main(["study", str(tmp_path / "study.yaml"), f"--output_dir={output}"]) == 0
    assert "teacher-server" not in capsys.readouterr().out
