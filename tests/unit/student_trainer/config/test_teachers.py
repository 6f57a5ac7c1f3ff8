"""The teachers that ``--teacher_url`` names."""

import pytest

from shared.errors import ConfigurationError
from student_trainer.commands.precompute import precompute
from student_trainer.config.arguments import DatasetArguments, TeacherArguments
from student_trainer.config.checks.teacher import check_dataset_teachers, check_teacher
from student_trainer.config.teachers import ServedTeacher, teachers_of
from tests.support.flags import read_trainer


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
        (["math=a:8000#v2"], "must look like http://host:8000: give math=http://a:8000#v2"),
        (["math=http://a:8000/v1"], "give math=http://a:8000$"),
        (["http://a:8000/v1#x"], "'http://a:8000/v1#x' is more than .* give http://a:8000#x$"),
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


LAUNCH = "--model_name_or_path org/m --output_dir out --teacher_url math=http://a code=http://b"


@pytest.mark.parametrize("names", [["math"], ["math", "code", "math"]], ids=["fewer", "more"])
def test_each_dataset_has_one_teacher(names):
    words = [*LAUNCH.split(), "--dataset_name", "a.jsonl", "b.jsonl", "--dataset_teacher", *names]
    with pytest.raises(ConfigurationError, match=f"{len(names)} teachers for 2 datasets; give one"):
        read_trainer(["distill", *words])
    with pytest.raises(ConfigurationError, match=f"{len(names)} teachers for 2 datasets; give one"):
        precompute([*words, "--teacher_cache", "cache", "--lmbda", "0"])


def test_rows_in_memory_have_no_teacher_of_a_dataset():
    teacher = TeacherArguments(["math=http://a"], dataset_teacher=["math"])
    dataset = DatasetArguments(dataset_name=["rows in memory"])
    dataset.rows = [{"prompt": "a"}]
    with pytest.raises(ConfigurationError, match="no effect on rows in memory"):
        check_dataset_teachers(teacher, dataset)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["math=http://a", "code=http://b"], "names 2 teachers, and `evaluate` compares with one"),
        (["math=http://a", "--dataset_teacher", "math"], "--dataset_teacher math has no effect on"),
        (["math=http://a", "--teacher_column", "who"], "--teacher_column who has no effect on"),
        (["http://a", "--teacher_prompt_template", "t.jinja"], "--teacher_prompt_template t.jinja"),
    ],
    ids=["several", "datasets", "column", "prompts"],
)
def test_evaluate_refuses_what_it_ignores(more, message):
    words = "--model_name_or_path org/m --output_dir out --dataset_name a.jsonl --teacher_url"
    with pytest.raises(ConfigurationError, match=message):
        read_trainer(["evaluate", *words.split(), *more])


@pytest.mark.parametrize(
    "value", ["", "ema", "ema=1", "ema=0", "ema=x", "ema=nan", "every=0", "every=1.5", "often=3"]
)
def test_a_wrong_teacher_sync_is_refused_by_its_form(value):
    with pytest.raises(ConfigurationError, match="give ema=SHARE") as caught:
        check_teacher(TeacherArguments(["http://a"], teacher_sync=value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["ema=0.99", "every=10"])
def test_a_teacher_that_follows_the_student_is_refused_before_anything_loads(value):
    line = ["distill", "--teacher_url", "http://a", "--model_name_or_path", "nowhere/at-all"]
    line += ["--dataset_name", "none.jsonl", "--output_dir", "out", "--teacher_sync", value]
    with pytest.raises(ConfigurationError, match="takes no weights while it runs"):
        read_trainer(line)
