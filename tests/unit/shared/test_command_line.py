"""One line for a mistake, and the name that was meant."""

import argparse

import pytest

from shared.command_line import OneLineParser, did_you_mean, likely_names
from shared.errors import ConfigurationError

FLAGS = ["--port", "--host", "--model_name_or_path", "--learning_rate", "--lr_scheduler_type"]


@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("--prot", ["--port"]),
        ("--model", ["--model_name_or_path"]),
        ("--model-name-or-path", ["--model_name_or_path"]),
        ("--l", []),  # one letter is like everything
        ("--lr", ["--lr_scheduler_type"]),
        ("--qqqq", []),
    ],
)
def test_an_unknown_name_is_like_some_known_ones(name, likely):
    assert likely_names(name, FLAGS) == likely


def test_the_habit_of_another_program_comes_before_likeness():
    habits = {"lr": ("eta", "learning_rate"), "train": ("--nothing",)}
    assert likely_names("--lr", FLAGS, habits) == ["--learning_rate"]
    assert likely_names("--train", FLAGS, habits) == []


def test_a_hint_names_up_to_three():
    assert did_you_mean("te", ["teacher_url", "teacher_cache", "other"]) == (
        " Did you mean teacher_url or teacher_cache?"
    )
    assert did_you_mean("te", ["te1", "te2", "te3", "te4"]).count("te") == 1


def parser():
    made = OneLineParser(prog="program")
    made.add_argument("file", metavar="FILE")
    made.add_argument("--learning_rate", "--learning-rate", type=float)
    made.add_argument("--tail", choices=["bucket", "drop"])
    return made


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "FILE is missing; see `program --help`"),
        (["--tial", "x"], "unknown argument '--tial'. Did you mean --tail?"),
        (["f", "--secret=s3cret"], "unknown argument '--secret'. See `program --help`"),
        (["f", "--learning_rate", "x"], "--learning_rate: invalid float value: 'x'"),
        (["f", "--tail"], "--tail: expected one argument"),
        (["f", "g"], "unknown argument 'g'. See `program --help`"),
        (["f", "--learn", "1"], "unknown argument '--learn'. Did you mean --learning_rate?"),
    ],
)
def test_a_mistake_is_one_line(argv, message):
    with pytest.raises(ConfigurationError) as caught:
        parser().parse(argv)
    assert str(caught.value) == message


def test_values_are_read_as_argparse_reads_them():
    read = parser().parse(["f", "--learning-rate", "0.5", "--tail=drop"])
    assert read == argparse.Namespace(file="f", learning_rate=0.5, tail="drop")
    assert parser().parse(["--", "--f"]).file == "--f"
