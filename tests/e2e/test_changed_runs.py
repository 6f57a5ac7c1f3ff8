"""A run that is gone on with by a changed command: refused where neither run meant the result."""

import json
from dataclasses import replace

import pytest

from student_trainer.commands.main import main
from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server


def distill(world, output, **options):
    options = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "output_dir": output,
        "teacher_url": world.url, "top_k_logprobs": 16, "lmbda": 0.5, "max_new_tokens": 4,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2,
        "save_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": "true",
        "resume_from_checkpoint": "auto", **options,
    }  # fmt: skip
    return main(["distill", *(f"--{name}={value}" for name, value in options.items())])


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """The output folder of a run of two steps."""
    output = tmp_path_factory.mktemp("begun")
    assert distill(world, output) == 0
    return output


def _no_student(*_, **__):
    raise AssertionError("a model loads")


def other_rows(world, folder):
    lines = world.rows.read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[1:]))
    return {"dataset_name": folder / "rows.jsonl"}


def other_template(world, folder):
    (folder / "template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return {"chat_template": folder / "template.jinja"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_rows, "the training rows as tokens"),
        (other_template, "the chat template"),
        (lambda *_: {"beta": 1}, "--beta 0.5 -> 1.0"),
        (lambda *_: {"seed": 7}, "--seed 42 -> 7"),
        (lambda *_: {"per_device_train_batch_size": 8}, "rows a step 4 -> 8"),
        (lambda *_: {"use_peft": "true"}, "--use_peft False -> True"),
    ],
    ids=["rows", "template", "beta", "seed", "batch", "peft"],
)
def test_another_run_is_refused_before_the_student_loads(
    world, begun, tmp_path, capsys, monkeypatch, change, named
):
    monkeypatch.setattr("student_trainer.training.recipe.load_student", _no_student)
    files = sorted(begun.rglob("*"))
    capsys.readouterr()
    assert distill(world, begun, max_steps=4, **change(world, tmp_path)) == 2
    said = capsys.readouterr().err
    assert named in said
    assert sorted(begun.rglob("*")) == files


def test_another_teacher_is_refused_until_it_is_accepted(world, begun, tmp_path, capsys):
    folder = tmp_path / "teacher"
    save_tokenizer(folder)
    save_model(folder, hidden_size=32, seed=3)
    with running_server(folder) as url:
        other = replace(world, url=url)
        assert distill(other, begun, max_steps=3) == 2
        said = capsys.readouterr().err
        assert "the teacher's weights" in said
        assert "--accept_teacher_change" in said
        assert distill(other, begun, max_steps=3, accept_teacher_change="true") == 0
    kept = json.loads((begun / "checkpoint-3" / "training_inputs.json").read_text())
    assert kept["told"]["the teacher's model"] == str(folder)


def test_a_longer_run_with_another_rate_goes_on_and_is_told(world, tmp_path, caplog):
    assert distill(world, tmp_path) == 0
    caplog.clear()
    assert distill(world, tmp_path, max_steps=3, learning_rate=1e-5) == 0
    [told] = [r.message for r in caplog.records if "with changes" in r.message]
    assert "--max_steps 2 -> 3" in told
    assert "--learning_rate" in told
