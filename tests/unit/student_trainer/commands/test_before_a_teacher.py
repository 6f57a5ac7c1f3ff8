"""Mistakes that need no teacher are told while none is there, and rows are not read twice."""

import json
import re
import time

import pytest

from shared.errors import ConfigurationError, DatasetError
from shared.identity import tokenizer_identity
from student_trainer import distill
from student_trainer.commands.main import main
from student_trainer.training import recipe
from tests.support.server import free_port
from tests.support.stub import StubTeacher, info
from tests.support.world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(world, tmp_path, url, **options):
    options = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "teacher_url": url,
        "output_dir": tmp_path / "out", "report_to": "none", "top_k_logprobs": 8,
        "max_new_tokens": 10, "teacher_timeout": 120, **options,
    }  # fmt: skip
    return main(["distill", *(f"--{name}={value}" for name, value in options.items())])


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "a"}, {}, "neither messages nor 'prompt'"),
        ({"prompt": "a"}, {"lmbda": 0}, "no completion to learn from"),
        ({"prompt": "a" * 400}, {"lmbda": 1}, "a.jsonl:1: the prompt has"),
        ({"prompt": "a", "completion": "b"}, {"output_dir": "a.jsonl/out"}, "is no folder that"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            {"lmbda": 1, "chat_template": "t.jinja"},
            "chat",
        ),
    ],
    ids=["columns", "method", "length", "output", "template"],
)
def test_a_mistake_is_told_before_a_teacher_is_waited_for(
    world, tmp_path, monkeypatch, capsys, row, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "t.jinja").write_text("{{ raise_exception('this chat is not for me') }}")

    def refuse(seconds):
        raise AssertionError("the teacher is waited for")

    monkeypatch.setattr(time, "sleep", refuse)
    url = f"http://127.0.0.1:{free_port()}"
    assert run(world, tmp_path, url, dataset_name="a.jsonl", **options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("context", [256, 40])
@pytest.mark.parametrize("vocab_size", [260, 259])
def test_rows_made_before_the_teacher_are_those_made_with_it(
    world, tmp_path, tokenizer, capsys, monkeypatch, context, vocab_size
):
    identity = tokenizer_identity(tokenizer)
    facts = info(tokenizer=identity, vocab_size=vocab_size, max_model_len=context)
    made = []
    prepare = recipe.prepare
    counted = lambda *given, **more: made.append(more) or prepare(*given, **more)  # noqa: E731
    monkeypatch.setattr(recipe, "prepare", counted)
    monkeypatch.setattr("student_trainer.commands.run_training.prepare", counted)
    told = []
    with StubTeacher(facts).serving() as stub:
        for not_ready in (0, 2):
            stub.not_ready = not_ready
            assert run(world, tmp_path, stub.url, dry_run=True) == 0
            told.append(re.sub(r"[\d,]+ bytes|fingerprint \w+", "", capsys.readouterr().out))
    assert told[0] == told[1]
    smaller = context < 256 or vocab_size < 260
    assert len(made) == (3 if smaller else 2)


def test_the_function_names_keywords_and_checks_as_early(world, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(DatasetError, match=r"^dataset='\./none': no such file"):
        distill(world.student, url, "./none", output_dir=tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"^model=: folder \./none does not exist"):
        distill("./none", url, world.rows, output_dir=tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"^beta=2\.0 must be from 0 to 1"):
        distill(world.student, url, world.rows, output_dir=tmp_path / "out", beta=2)
    with pytest.raises(DatasetError, match=r"Name the columns with prompt_column= and"):
        distill(world.student, url, [{"a": "b"}], output_dir=tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"tokenizer=: folder \./none does not exist"):
        distill(object(), url, [{"prompt": "a"}], tokenizer="./none", output_dir=tmp_path / "out")
