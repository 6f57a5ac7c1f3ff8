"""The teachers that ``--teacher_url`` names."""

import pytest

from shared.errors import ConfigurationError
from student_trainer.commands.main import main
from student_trainer.config.arguments import DatasetArguments, TeacherArguments
from student_trainer.config.checks.teacher import check_dataset_teachers, check_teacher
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


@pytest.mark.parametrize("names", [["math"], ["math", "code", "math"]])
@pytest.mark.parametrize("command", ["distill", "precompute"])
def test_each_dataset_has_its_teacher_or_none_has(tmp_path, capsys, command, names):
    """One too few left rows without a value, and one too many was read by nothing."""
    (tmp_path / "config.json").write_text("{}")
    rows = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for file in rows:
        file.write_text('{"prompt": "a", "completion": "b"}\n')
    argv = [
        command, "--model_name_or_path", tmp_path, "--dataset_name", *rows, "--lmbda", "0",
        "--output_dir", tmp_path / "out", "--teacher_cache", tmp_path / "cache",
        "--teacher_url", "math=http://a", "code=http://b", "--dataset_teacher", *names,
    ]  # fmt: skip
    assert main([str(word) for word in argv]) == 2
    assert f"{len(names)} teachers for 2 datasets; give one for each" in capsys.readouterr().err


def test_rows_in_memory_have_no_dataset_to_name_a_teacher_of():
    dataset = DatasetArguments(["rows"])
    dataset.rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ConfigurationError, match="math has no effect on rows in memory"):
        check_dataset_teachers(dataset, TeacherArguments(["math=http://a"], "teacher", ["math"]))


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
