"""`--help` is short and in groups; `--help_all` has everything."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError

import pytest
from transformers import TrainingArguments

from student_trainer.commands.main import main
from student_trainer.config import trainer_flags as trainer_flags_module
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import flags_of
from student_trainer.config.help import EXIT_CODES, GROUPS, actions_of
from student_trainer.config.parse import make_parser
from student_trainer.config.trainer_flags import read_from_transformers, trainer_flags
from tests.support.flags import read_trainer

OF_TRANSFORMERS = {field.name for field in fields(TrainingArguments)}


def parser_of(command):
    return make_parser(*ARGUMENTS[command], prog=f"student-trainer {command}", description="")


def printed(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_each_flag_of_ours_is_in_a_group_and_no_group_is_empty():
    kinds = {kind for kinds in ARGUMENTS.values() for kind in kinds}
    groups = {
        name: one.group
        for kind in kinds
        for name, one in flags_of(kind).items()
        if one.group is not None or name not in OF_TRANSFORMERS
    }
    assert set(groups.values()) == set(GROUPS)


def test_the_saved_flags_of_transformers_are_those_of_the_pinned_version():
    assert trainer_flags() == read_from_transformers()


def test_flags_of_another_transformers_are_read_once_and_kept(tmp_path, monkeypatch):
    read = []

    def read_slowly():
        read.append(1)
        return known

    known = trainer_flags_module._read()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer_flags_module, "version", lambda name: "5.16.1")
    monkeypatch.setattr(trainer_flags_module, "_read", read_slowly)
    fresh = trainer_flags.__wrapped__  # without functools.cache
    assert fresh() == fresh() == read_from_transformers()
    assert len(read) == 2  # the second by `read_from_transformers`
    [file] = (tmp_path / "cache" / "sparse-gkd").iterdir()
    for damaged in ("", "[]", '{"transformers": "5.16.1", "flags": [{"name": "seed"}]}'):
        file.write_text(damaged)
        assert fresh() == fresh() == trainer_flags()
    assert len(read) == 5


def test_a_first_import_with_another_transformers_reads_and_keeps_them(tmp_path):
    code = (
        "import importlib.metadata as metadata\n"
        "known = metadata.version\n"
        "metadata.version = lambda name: '5.16.1' if name == 'transformers' else known(name)\n"
        "from student_trainer.config import trainer_flags\n"
        "assert 'learning_rate' in trainer_flags.trainer_flags()\n"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)
    assert (tmp_path / "sparse-gkd" / "trainer_flags-5.16.1.json").exists()


def test_without_transformers_the_flags_are_those_of_the_pinned_one(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trainer_flags_module, "version", absent)
    monkeypatch.setattr(trainer_flags_module, "_read", None)
    saved = json.loads(trainer_flags_module.FILE.read_text())["flags"]
    assert list(trainer_flags.__wrapped__()) == [flag["name"] for flag in saved]


def test_flags_are_read_without_a_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(trainer_flags_module, "version", lambda name: "5.16.1")
    assert trainer_flags.__wrapped__() == trainer_flags()


def listed(text):
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


COMMAND = ["--config", "--help", "--help_all"]


@pytest.mark.parametrize("command", ["sft", "distill", "precompute", "evaluate", "merge"])
def test_help_lists_the_common_flags_and_no_others(capsys, command):
    types = ARGUMENTS["distill" if command == "precompute" else command]
    flags = {name: one for kind in types for name, one in flags_of(kind).items()}
    common = [f"--{name}" for name, one in flags.items() if one.common]
    short = printed(capsys, command, "--help")
    assert sorted(listed(short)) == sorted([*common, *COMMAND])
    assert len(common) <= 25
    assert "--help_all lists every flag" in " ".join(short.split())


def test_help_ends_with_the_exit_codes_and_is_not_too_wide(capsys):
    short = printed(capsys, "distill", "--help")
    assert EXIT_CODES in short
    assert max(len(line) for line in short.splitlines()) <= 100


@pytest.mark.parametrize("command", ["sft", "distill", "precompute", "evaluate", "merge"])
def test_help_ends_with_an_example_that_is_read(capsys, command):
    """Its flags are among those that matter, and their combination is accepted."""
    short = printed(capsys, command, "--help")
    example = shlex.split(short.rpartition("\nexample:\n")[2].replace("\\\n", " "))
    assert example[:2] == ["student-trainer", command]
    given = [word for word in example if word.startswith("--")]
    assert set(given) <= set(listed(short))
    if command != "merge":  # of adapters that are there
        read_trainer([command if command != "precompute" else "distill", *example[2:]])


def test_help_all_lists_each_flag_once_and_the_groups_in_their_order(capsys):
    text = printed(capsys, "distill", "--help_all")
    assert len(listed(text)) == len(set(listed(text))) > 100
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert [title for title in GROUPS if title in titles] == titles[:-1]
    assert titles[-1] == "transformers' Trainer"
    assert listed(text)[-1] not in listed(text.split("transformers' Trainer:")[0])


def test_help_shows_values_and_defaults(capsys):
    text = printed(capsys, "distill", "--help_all")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "--teacher_unreachable wait|stop" in lines
    assert any(line.startswith("--lora_r N Rank of the adapters. (default: 16)") for line in lines)
    assert any(line.startswith("--lora_dropout X") and "(default: 0.0)" in line for line in lines)
    assert any(line.startswith("--use_peft Train LoRA") for line in lines)


@pytest.mark.parametrize("command", ["sft", "distill", "evaluate"])
def test_help_all_has_every_flag(capsys, command):
    text = printed(capsys, command, "--help_all")
    for name in actions_of(parser_of(command)):
        assert f"--{name}" in text
