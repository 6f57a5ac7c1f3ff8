"""`--help` is short and in groups; `--help_all` has everything."""

from collections import Counter
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from student_trainer.commands.main import main
from student_trainer.config.help import EXIT_CODES, GROUPS, flags_of
from student_trainer.config.parse import ARGUMENTS, make_parser

OF_TRANSFORMERS = {field.name for field in fields(TrainingArguments)}


def parser_of(command):
    types = ARGUMENTS["distill" if command == "precompute" else command]
    return make_parser(*types, prog=f"student-trainer {command}", description="")


def printed(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(GROUPS))
def test_each_flag_of_ours_is_in_one_group(command):
    grouped = Counter(name for names in GROUPS[command].values() for name in names)
    for name in flags_of(parser_of(command)):
        assert grouped[name] <= 1, name
        if name not in OF_TRANSFORMERS:
            assert grouped[name] == 1, name


def test_groups_name_no_flag_that_is_not_there():
    there = {name for command in GROUPS for name in flags_of(parser_of(command))}
    assert {n for groups in GROUPS.values() for names in groups.values() for n in names} <= there


def test_help_names_each_flag_once_and_leaves_most_of_transformers_out(capsys):
    short = printed(capsys, "distill", "--help")
    listed = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert len(listed) == len(set(listed)) < 90
    assert "--teacher_url" in listed
    assert "--neftune_noise_alpha" not in short
    assert EXIT_CODES in short
    assert max(len(line) for line in short.splitlines()) <= 100


def test_help_shows_values_and_defaults(capsys):
    lines = [" ".join(line.split()) for line in printed(capsys, "distill", "-h").splitlines()]
    assert "--teacher_unreachable wait|stop" in lines
    assert any(line.startswith("--lora_r N Rank of the adapters (default: 16)") for line in lines)
    assert any(line.startswith("--lora_dropout X") and "(default: 0.0)" in line for line in lines)
    assert any(line.startswith("--use_peft Train LoRA") for line in lines)


@pytest.mark.parametrize("command", ["sft", "distill", "evaluate"])
def test_help_all_has_every_flag(capsys, command):
    text = printed(capsys, command, "--help_all")
    for name in flags_of(parser_of(command)):
        assert f"--{name}" in text
