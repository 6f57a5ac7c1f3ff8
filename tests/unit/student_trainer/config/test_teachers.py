"""The teachers that ``--teacher_url`` names."""

import pytest

from shared.errors import ConfigurationError
from student_trainer.commands.main import main
from student_trainer.config.arguments import TeacherArguments
from student_trainer.config.checks.teacher import check_teacher
from student_trainer.config.teachers import ServedTeacher, teachers_of


def test_addresses_of_one_name_are_replicas():
    urls = ["math=http://a:8000", "code=http://c", "math=http://b:8000"]
    assert teachers_of(urls) == [
        ServedTeacher("math", ("http://a:8000", "http://b:8000"), None),
        ServedTeacher("code", ("http://c",), None),
    ]


def test_addresses_without_a_name_are_replicas_of_the_only_teacher():
    assert teachers_of(["http://a", "http://b"]) == [
        ServedTeacher("", ("http://a", "http://b"), None)
    ]


def test_a_model_of_a_server_of_several_follows_the_address():
    assert teachers_of(["math=http://a:8000#math-v2", "http://b"][:1]) == [
        ServedTeacher("math", ("http://a:8000",), "math-v2")
    ]


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (["math=http://a", "http://b"], "http://b has no name, and math has"),
        (["math=a:8000"], "must look like http://host:8000"),
        (["my teacher=http://a"], "must look like"),
        (["math=http://user:secret@a"], "holds a user or a password"),
        (["math=http://a#x", "math=http://b#y"], "name different models after '#': x, y"),
    ],
)
def test_what_names_no_teacher_is_refused(urls, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        teachers_of(urls)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("urls", "flags", "message"),
    [
        (["http://a"], {"dataset_teacher": ["math"]}, "--dataset_teacher .* has no effect"),
        (["http://a"], {"teacher_column": "who"}, "--teacher_column who has no effect"),
        (["m=http://a"], {"dataset_teacher": ["math"]}, "--dataset_teacher math: no --teacher_url"),
        (["http://a"], {"teacher_chat_template_kwargs": "[1]"}, "must be a JSON object"),
    ],
)
def test_flags_about_teachers_that_there_are_not_are_refused(urls, flags, message):
    with pytest.raises(ConfigurationError, match=message):
        check_teacher(TeacherArguments(urls, **flags))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a=http://a", "b=http://b"], "names 2 teachers; `evaluate` compares with one"),
        (["a=http://a", "--teacher_column=who"], "--teacher_column who has no effect"),
        (
            ["http://a", "--teacher_prompt_template=x.jinja"],
            "--teacher_prompt_template x.jinja has",
        ),
    ],
)
def test_evaluate_compares_with_one_teacher_that_sees_what_the_model_sees(argv, message, capsys):
    words = ["evaluate", "--model_name_or_path=org/m", "--suite=humaneval", "--output_dir=out"]
    assert main([*words, "--teacher_url", *argv]) == 2
    assert message in capsys.readouterr().err
