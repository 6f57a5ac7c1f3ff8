"""Gemma 3 270M as published: 262,145 tokens, 262,144 rows. Teacher and student are the same."""

import json
import math

import pytest

from student_trainer.client import TeacherClient
from student_trainer.commands.main import main
from student_trainer.config.arguments import ModelArguments
from student_trainer.model.load import load_tokenizer
from tests.support.real import model_folder
from tests.support.server import running_server

IMAGE = "<image_soft_token>"  # the token without a row
ROWS = [
    {"prompt": "The capital of France is", "completion": " Paris."},
    {"prompt": "Two and two are", "completion": " four."},
]


@pytest.fixture(scope="module")
def gemma():
    return model_folder("gemma-3-270m")


@pytest.fixture(scope="module")
def url(gemma):
    with running_server(gemma, "--max-model-len", "64") as url:
        yield url


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_is_a_teacher_of_itself(gemma, url, tmp_path, capsys):
    """The divergence of a model from itself is 0, so a step of distillation changes nothing."""
    rows = write(tmp_path / "rows.jsonl", ROWS)
    shared = [
        f"--model_name_or_path={gemma}", f"--dataset_name={rows}", f"--teacher_url={url}",
        "--max_length=32", "--max_new_tokens=4",
    ]  # fmt: skip
    code = main([
        "distill", *shared, f"--output_dir={tmp_path / 'out'}", "--lmbda=0", "--max_steps=1",
        "--logging_steps=1", "--report_to=none", "--per_device_train_batch_size=2",
        "--torch_dtype=float32", "--save_strategy=no", "--use_peft=true",
    ])  # fmt: skip
    assert code == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert abs(state["log_history"][0]["train/loss"]) < 1e-3

    cache = tmp_path / "cache"
    assert (
        main(
            [
                "precompute",
                *shared,
                f"--teacher_cache={cache}",
                "--lmbda=0",
                f"--output_dir={tmp_path / 'out'}",
            ]
        )
        == 0
    )
    assert any(cache.iterdir())


def test_doctor_compares_it_with_its_teacher(gemma, url, capsys):
    assert main(["doctor", "--teacher_url", url, "--model_name_or_path", str(gemma)]) in (0, 1)
    out = capsys.readouterr().out
    assert "ok   tokenizers" in out
    assert "ok   end tokens" in out


def test_python_scores_and_generates(gemma, url):
    tokenizer = load_tokenizer(ModelArguments(str(gemma)))
    with TeacherClient(url, tokenizer=tokenizer) as teacher:
        [written] = teacher.generate(["The capital of France is"], max_new_tokens=3)
        [scored] = teacher.score([(written.sample.token_ids, written.sample.completion_start)])
    assert math.isfinite(float(scored.scores.next_token_logprob.sum()))
    assert scored.scores.next_token_logprob == pytest.approx(
        written.scores.next_token_logprob, abs=1e-2
    )


def test_a_row_that_holds_the_token_without_a_row_is_named(gemma, url, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [*ROWS, {"prompt": IMAGE, "completion": " a cat"}])
    code = main([
        "distill", f"--model_name_or_path={gemma}", f"--dataset_name={rows}",
        f"--teacher_url={url}", "--max_length=32", "--max_new_tokens=4", "--lmbda=0",
        f"--output_dir={tmp_path / 'out'}", "--split_special_tokens=false", "--dry_run",
    ])  # fmt: skip
    assert code == 2
    said = capsys.readouterr().err
    assert "rows.jsonl:3" in said
    assert IMAGE in said


def test_evaluate_tells_perplexity_and_divergence(gemma, url, tmp_path):
    checker = {"kind": "exact_match", "answer": "Paris."}
    rows = write(tmp_path / "rows.jsonl", [{**row, "checker": checker} for row in ROWS])
    code = main([
        "evaluate", f"--model_name_or_path={gemma}", f"--dataset_name={rows}",
        "--max_new_tokens=4", f"--teacher_url={url}", f"--output_dir={tmp_path / 'evaluated'}",
    ])  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    assert 1 < results["perplexity"] < 100
    assert abs(results["divergence"]) < 1e-3  # from itself
