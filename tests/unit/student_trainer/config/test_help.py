"""`--help` is short and in groups; `--help_all` has everything."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from student_trainer.commands.main import main
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import flags_of
from student_trainer.config.help import EXIT_CODES, GROUPS, actions_of
from student_trainer.config.parse import make_parser
from student_trainer.config.trainer_flags import read_from_transformers, trainer_flags

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
    for name in actions_of(parser_of(command)):
        assert f"--{name}" in text
