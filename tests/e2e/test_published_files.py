"""GSM8K and HumanEval as they are published, through the command line with a tiny local model.

Scores of such a model are near zero; what is shown is that files are read as they are, that the
checkers judge, and that training goes all the way.
"""

import gzip
import json
from pathlib import Path

import pytest

from student_trainer.commands.main import main
from student_trainer.evaluation.passk import read_samples
from tests.e2e.test_distillation import distill, history
from tests.support.data import published
from tests.support.models import save_model, save_tokenizer


def head(source: str, target: Path, lines: int) -> Path:
    opener = gzip.open if source.endswith(".gz") else open
    with opener(source, "rt") as file:
        target.write_text("".join(line for line, _ in zip(file, range(lines), strict=False)))
    return target


@pytest.fixture(scope="module")
def long_student(tmp_path_factory):
    """Room for a byte-level HumanEval prompt."""
    folder = tmp_path_factory.mktemp("student")
    save_tokenizer(folder)
    save_model(folder, hidden_size=16, max_position_embeddings=4096)
    return folder


GSM8K = {"prompt_column": "question", "completion_column": "answer"}


@pytest.mark.parametrize("lmbda", [0, 1])
def test_distillation_on_gsm8k_as_published(world, tmp_path, lmbda):
    # Most rows are longer than the served teacher's context of 256 bytes.
    train = head(published("gsm8k_train.jsonl"), tmp_path / "train.jsonl", 400)
    test = head(published("gsm8k_test.jsonl"), tmp_path / "test.jsonl", 200)
    code = distill(
        world, tmp_path / "out", dataset_name=train, lmbda=lmbda, max_steps=20,
        eval_dataset_name=test, eval_strategy="steps", eval_steps=20,
        eval_on_start="true", skip_long_rows="true", **GSM8K,
    )  # fmt: skip
    assert code == 0
    divergences = [e["eval/divergence"] for e in history(tmp_path / "out") if "eval/loss" in e]
    assert divergences[1] < 0.9 * divergences[0]


def test_a_gsm8k_prompt_is_one_user_turn_and_its_answer_is_learned(world):
    from transformers import AutoTokenizer

    from student_trainer.config.arguments import DataArguments
    from student_trainer.data.examples import RowTokenizer
    from student_trainer.data.rows import load_rows
    from student_trainer.data.tokenize import tokenize_rows

    tokenizer = AutoTokenizer.from_pretrained(world.student)
    rows = load_rows(published("gsm8k_train.jsonl"), config=None, split="train")
    assert len(rows) == 7473
    (example,) = tokenize_rows(
        rows[:1], RowTokenizer(tokenizer, (1,), DataArguments(**GSM8K), 4096)
    )
    row = rows[0][1]
    assert example.prompt == f"<|user|>{row['question']}<|end|><|assistant|>"
    assert tokenizer.decode(example.sample.completion_ids) == f"{row['answer']}<|end|>"


def evaluate(model, dataset, output, **options):
    settings = {
        "model_name_or_path": model, "dataset_name": dataset, "output_dir": output,
        "max_new_tokens": 16, **options,
    }  # fmt: skip
    assert main(["evaluate", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    return json.loads((output / "results.json").read_text()), read_samples(output / "samples.jsonl")


def test_humaneval_is_read_as_published_and_sampled_n_times(long_student, tmp_path):
    results, samples = evaluate(
        long_student, published("HumanEval.jsonl.gz"), tmp_path, n=2, temperature=1.0, limit=6
    )
    assert results["problems"] == 6
    assert results["pass@1"] == 0.0
    assert [sample["task_id"] for sample in samples[:4]] == ["HumanEval/0"] * 2 + [
        "HumanEval/1"
    ] * 2
    assert samples[0]["completion"] != samples[1]["completion"]
    assert all(not sample["passed"] and sample["result"] for sample in samples)


def test_gsm8k_is_judged_by_the_final_number(long_student, tmp_path):
    test = head(published("gsm8k_test.jsonl"), tmp_path / "test.jsonl", 8)
    results, samples = evaluate(long_student, test, tmp_path / "out")
    assert (results["problems"], results["exact_match"]) == (8, 0.0)
    assert samples[0]["result"].endswith("is not '18'")


def test_the_same_seed_gives_the_same_samples(long_student, tmp_path):
    def completions(name, seed):
        _, samples = evaluate(
            long_student, published("HumanEval.jsonl.gz"), tmp_path / name, n=2, temperature=1.0,
            limit=3, seed=seed, generation_batch_size=1 if name == "alone" else 6,
        )  # fmt: skip
        return [sample["completion"] for sample in samples]

    together = completions("together", 1)
    assert together == completions("alone", 1)
    assert together != completions("other", 2)
