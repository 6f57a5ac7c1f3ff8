"""Folders that cannot be written to are told before anything loads."""

import json
from pathlib import Path

import pytest

from shared.errors import ConfigurationError, DatasetError
from student_trainer.commands.main import main
from student_trainer.config.arguments import DatasetArguments, ModelArguments
from student_trainer.config.checks import check_model
from student_trainer.config.files import check_rows_exist
from student_trainer.runtime.folders import check_output_file, check_output_folder


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=f"{tmp_path / 'file'} is no folder that can be"):
        check_output_folder("--output_dir", str(tmp_path / "file" / "out"))


def test_one_that_could_be_made_is_not_made(tmp_path, monkeypatch):
    check_output_folder("--output_dir", str(tmp_path / "a" / "b"))
    monkeypatch.chdir(tmp_path)
    check_output_folder("--output_dir", "c/d")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_where_not_even_root_makes_one_is_refused():
    with pytest.raises(ConfigurationError, match="/proc is no folder that can be written to"):
        check_output_folder("--output_dir", "/proc/out")


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigurationError, match="give another"):
        check_output_folder("--output_dir", str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-9/a.jsonl"], ids=["long", "no home"])
def test_names_that_the_system_refuses_are_missing_and_no_traceback(name):
    with pytest.raises(DatasetError, match="no such file or folder"):
        check_rows_exist(DatasetArguments(dataset_name=[name]))
    with pytest.raises(ConfigurationError, match="does not exist"):
        check_model(ModelArguments(model_name_or_path=name))
    check_output_folder("--output_dir", name)


def _written_by(command, folder):
    out = ["--output_dir", str(folder / "out")]
    blocked = str(folder / "file" / "x")
    run = ["--model_name_or_path", "org/model", "--dataset_name", "org/rows"]
    teacher = ["--teacher_url", "http://127.0.0.1:9"]
    return {
        "sft": ("--output_dir", ["sft", *run, "--output_dir", blocked]),
        "distill": (
            "--teacher_cache", ["distill", *run, *out, *teacher, "--teacher_cache", blocked],
        ),
        "precompute": (
            "--teacher_cache",
            ["precompute", *run, *out, *teacher, "--lmbda", "0", "--teacher_cache", blocked],
        ),
        "evaluate": ("--output_dir", ["evaluate", *run, "--output_dir", blocked]),
        "merge": (
            "--output_dir", ["merge", "--model_name_or_path", str(folder), "--output_dir", blocked],
        ),
        "study": ("--output_dir", ["study", str(folder / "s.yaml"), "--output_dir", blocked]),
        "report": ("--output", ["report", str(folder), "--output", f"{folder}/none/x.html"]),
        "plots": ("--plots", ["report", str(folder), "--plots", blocked]),
    }[command]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    ["sft", "distill", "precompute", "evaluate", "merge", "study", "report", "plots"],
)
def test_commands_tell_it_before_anything_loads(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    study = {
        "title": "t", "seeds": [0],
        "measure": {"command": "python a.py", "flags": {"m": "{model}"}, "metric": "m"},
        "cells": {"one": {"command": "python a.py"}}, "tables": {"t": {"cells": ["one"]}},
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(json.dumps(study))
    monkeypatch.setattr("student_trainer.reporting.command.find_runs", lambda runs: runs)
    flag, arguments = _written_by(command, tmp_path)

    def refuse(*_, **__):
        raise AssertionError("it began")

    for name in (
        "commands.run_training.run_sft", "commands.run_training.run_distill",
        "commands.run_training.run_precompute", "commands.run_evaluation.run_evaluation",
        "model.load.load_model", "reporting.command.page_of", "study.runner.Runner.run",
    ):  # fmt: skip
        monkeypatch.setattr(f"student_trainer.{name}", refuse)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{flag} {arguments[-1]}: " in error
    assert "give another" in error


def test_a_file_that_is_there_is_written_whatever_its_folder(tmp_path, monkeypatch):
    check_output_file("--output", Path("/dev/stdout"))
    with pytest.raises(ConfigurationError, match="is no file that can be written to"):
        check_output_file("--output", tmp_path)
