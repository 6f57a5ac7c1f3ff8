"""The recipe: its data, every command of its README, and the README's arithmetic."""

import json
import re
from pathlib import Path

import pytest

from examples.deepseek_coder import prepare
from shared.errors import DatasetError
from student_trainer.commands.main import main
from student_trainer.data.rows import load_rows
from tests.support.data import published
from tests.support.flags import read_server, read_trainer, server_lines, trainer_lines, with_key
from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server

ROOT = Path(__file__).parents[3]
README = ROOT / "examples" / "deepseek_coder" / "README.md"
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": (
        "def has_close_elements(numbers, threshold):\n"
        '    """Check if in given list of numbers, are any two numbers closer to each other\n'
        '    than given threshold."""\n'
    ),
    "entry_point": "has_close_elements",
    "canonical_solution": (
        "    return any(abs(a - b) < threshold for a in numbers for b in numbers)\n"
    ),
    "test": "def check(f):\n    assert f([1.0, 2.0], 0.5) is False\n",
}


@pytest.mark.parametrize("words", trainer_lines(README), ids=lambda words: " ".join(words)[:60])
def test_every_command_of_the_trainer_is_accepted(words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "distill" in words:
        key = with_key(["--teacher_api_key_file", "teacher.key"], tmp_path)
        *_, args = read_trainer([*words, *key])
        assert (args.lmbda, args.beta) == (0.5, 0.5)
    else:
        read_trainer(words)


def test_the_server_serves_what_was_merged(tmp_path, monkeypatch):
    (words,) = server_lines(README)
    (merged,) = (words for words in trainer_lines(README) if words[0] == "merge")
    model = tmp_path / merged[merged.index("--output_dir") + 1]
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert words[1] == model.name
    monkeypatch.chdir(tmp_path)
    assert read_server(with_key(words, tmp_path), monkeypatch).host == "0.0.0.0"


@pytest.mark.parametrize(
    "sum_", re.findall(r"`([^`=]+ = [^`]+)`", README.read_text()), ids=lambda line: line[:60]
)
def test_the_arithmetic_is_right(sum_):
    expression, _, result = sum_.partition(" = ")
    python = expression.replace("×", "*").replace("^", "**")
    assert re.fullmatch(r"[\d.()*/+ -]+", python)
    value, unit = re.fullmatch(r"([\d.]+) ?(.*)", result).groups()
    computed = eval(python)
    if unit == "M" and computed > 1e6:
        computed /= 1e6
    assert float(value) == round(computed, len(value.partition(".")[2]))


@pytest.mark.parametrize(
    ("prompt", "completion", "kept"),
    [
        ("Sort a list of numbers.", "def f(x):\n    return sorted(x)", True),
        # The problem's text in another layout, and in capitals.
        ("CHECK IF, in given list: of numbers are any two numbers closer?", "x", False),
        # Only a part of it, nine words.
        ("if in given list of numbers, are any two", "x", True),
        # The solution, with other spaces.
        ("Close?", "return any( abs(a-b)<threshold for a in numbers for b in numbers )", False),
        # Across the border of the two.
        ("given list of numbers are any", "two numbers closer to each other", False),
    ],
)
def test_rows_that_resemble_a_problem_are_left_out(prompt, completion, kept):
    row = {"prompt": prompt, "completion": completion}
    assert list(prepare.without([row], [PROBLEM])) == ([row] if kept else [])


def test_no_problem_of_humaneval_is_in_the_file(tmp_path, capsys):
    problems = published("HumanEval.jsonl.gz")
    rows = [row for _, row in load_rows(problems, config=None, split="test")]
    source, output = tmp_path / "source.jsonl", tmp_path / "train.jsonl"
    asked = [{"problem": row["prompt"], "solution": row["canonical_solution"]} for row in rows]
    asked.append({"problem": " Add two numbers. ", "solution": "def add(a, b): return a + b"})
    source.write_text("".join(json.dumps(row) + "\n" for row in asked))
    prepare.main(["--output", str(output), "--dataset_name", str(source), "--humaneval", problems])
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {
            "prompt": "### Instruction:\nAdd two numbers.\n### Response:\n",
            "completion": "def add(a, b): return a + b",
        }
    ]
    assert f"{len(rows)} resembled HumanEval" in capsys.readouterr().out


def test_a_row_without_an_answer_is_named():
    with pytest.raises(DatasetError, match=r"file:3: 'problem' and 'solution' must be text"):
        list(prepare.as_rows([("file:3", {"problem": "Why?"})], "problem", "solution"))


def test_the_commands_run_on_shrunken_models_one_after_another(tmp_path, monkeypatch):
    """Two steps each; ZeRO-3 and downloads are left out."""
    configs = ROOT / "examples" / "deepseek_coder"
    monkeypatch.chdir(tmp_path)
    for name, width, seed in (("teacher_base", 32, 1), ("student_base", 16, 2)):
        save_tokenizer(tmp_path / name)
        save_model(tmp_path / name, hidden_size=width, seed=seed, max_position_embeddings=512)
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    asked = [{"problem": f"Add {i}.", "solution": f"def f(x): return x + {i}"} for i in range(16)]
    (tmp_path / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    prepare.main(
        ["--output", "train.jsonl", "--dataset_name", "source.jsonl", "--humaneval",
         "problems.jsonl"]
    )  # fmt: skip

    def run(command, config, *more):
        assert main([command, "--config", str(configs / config), *more]) == 0

    short = ["--max_steps", "2", "--max_length", "128", "--report_to", "none"]
    run("sft", "sft_teacher.yaml", "--model_name_or_path", "teacher_base", *short)
    (merge,) = (words for words in trainer_lines(README) if words[0] == "merge")
    assert main(merge) == 0
    key = with_key(["--teacher_api_key_file", "teacher.key"], tmp_path)
    with running_server(tmp_path / "teacher", "--api-key-file", key[1]) as url:
        run(
            "distill", "distill.yaml", "--model_name_or_path", "student_base", *short, *key,
            "--teacher_url", url, "--max_new_tokens", "8",
        )  # fmt: skip
    run(
        "evaluate", "evaluate.yaml", "--suite", "humaneval", "--dataset_name", "problems.jsonl",
        "--max_new_tokens", "8",
    )  # fmt: skip
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["pass@1"] == 0.0
    assert (tmp_path / "student_adapters" / "adapter_model.safetensors").exists()
