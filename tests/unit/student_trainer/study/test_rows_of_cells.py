"""The rows that a study's cells name are looked at before the first cell runs."""

import json

import pytest

from student_trainer.commands.main import main
from student_trainer.study.runner import Runner


def _study(folder, **flags):
    cell = {"command": "sft", "flags": {"model_name_or_path": "org/m", **flags}}
    content = {
        "title": "t", "seeds": [0],
        "measure": {"command": "python a.py", "flags": {"m": "{model}"}, "metric": "m"},
        "cells": {"one": cell}, "tables": {"t": {"cells": ["one"]}},
    }  # fmt: skip
    (folder / "s.yaml").write_text(json.dumps(content))
    return ["study", str(folder / "s.yaml"), "--output_dir", str(folder / "out")]


@pytest.fixture
def began(monkeypatch):
    jobs = []
    monkeypatch.setattr(Runner, "run", lambda runner, planned, plan: jobs.extend(planned))
    return jobs


@pytest.mark.parametrize("key", ["dataset_name", "eval_dataset_name"])
def test_a_broken_file_is_told_with_its_key(tmp_path, capsys, began, key):
    rows = tmp_path / "a.jsonl"
    rows.write_text("{\n")
    names = {"dataset_name": ["org/rows"], key: str(rows)}
    assert main(_study(tmp_path, **names)) == 2
    error = capsys.readouterr().err
    assert f"s.yaml: cells.one.flags.{key}: {rows}:1: not valid JSON" in error
    assert not began


@pytest.mark.parametrize("name", ["none.jsonl", "org/rows", "{seed}.jsonl"])
def test_what_a_cell_may_make_is_left_to_its_command(tmp_path, began, name):
    assert main(_study(tmp_path, dataset_name=name)) == 0
    assert began
