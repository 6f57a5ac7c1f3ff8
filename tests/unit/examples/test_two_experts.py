"""The two experts' data: its split, its answers, its rows' teachers; and the average of models."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from examples.two_experts.average import average
from examples.two_experts.prepare import make_dataset, prepare
from examples.two_experts.settings import SETTINGS
from examples.two_experts.word_problems import (
    LARGEST,
    OPERATIONS,
    STYLES,
    Problem,
    Step,
    is_held_out,
    random_problem,
)
from student_trainer.evaluation.checkers import check_completions
from tests.support.flags import read_server, read_trainer, server_lines, trainer_lines
from tests.support.models import save_model, save_tokenizer

README = Path(__file__).parents[3] / "examples" / "two_experts" / "README.md"

SEED = 3
SMALL = replace(
    SETTINGS,
    pretrain_rows=300,
    warmup_rows=100,
    labelled_rows=50,
    prompt_rows=100,
    held_out_rows=60,
)
PLUS, MINUS, TIMES, OVER = OPERATIONS


@pytest.fixture(scope="module")
def data():
    return make_dataset(SEED, SMALL)


def of(rows, teacher):
    return [row for row in rows if row["teacher"] == teacher]


def label(row):
    return row["messages"][1]["content"]


def path(row):
    return row["task_id"].split(":")[0]


def test_a_problem_says_and_works_out_its_two_steps():
    problem = Problem("Ann", "pears", 9, (Step(TIMES, 2), Step(OVER, 3)))
    assert problem.question("target") == (
        "Ann has 9 pears, swaps each for 2 and keeps one of every 3. How many pears has Ann now?"
    )
    assert problem.worked_answer() == " 9 * 2 = 18\n 18 / 3 = 6\n#### 6"
    assert problem.path == "9*2/3"


@pytest.mark.parametrize(
    ("operation", "value", "number", "result"),
    [
        (PLUS, LARGEST, 2, None),
        (PLUS, 20, 4, 24),
        (MINUS, 5, 5, None),
        (MINUS, 5, 4, 1),
        (TIMES, 12, 3, None),
        (OVER, 9, 2, None),
        (OVER, 9, 3, 3),
    ],
)
def test_a_number_on_the_way_is_whole_and_small(operation, value, number, result):
    assert operation.result(value, number) == result


def test_no_wording_of_the_users_is_one_of_pretraining():
    for operation in OPERATIONS:
        assert len({getattr(operation, style) for style in STYLES}) == len(STYLES)


def test_about_one_path_in_eight_is_held_out():
    rng = random.Random(0)
    problems = {p.path: p for p in (random_problem(rng) for _ in range(3000))}
    share = sum(is_held_out(p, SEED) for p in problems.values()) / len(problems)
    assert 0.08 < share < 0.18


def test_each_file_has_rows_of_both_kinds(data):
    counts = {
        name: (len(of(rows, "programs")), len(of(rows, "problems"))) for name, rows in data.items()
    }
    assert counts == {
        "pretrain": (300, 300),
        "warmup": (100, 100),
        "labelled_programs": (50, 0),
        "labelled_problems": (0, 50),
        "labelled": (50, 50),
        "prompts": (100, 100),
        "held_out": (60, 60),
    }


def test_tasks_are_distinct_across_labels_prompts_and_evaluation(data):
    ids = [r["task_id"] for name in ("labelled", "prompts", "held_out") for r in data[name]]
    assert len(ids) == len(set(ids)) == 420
    assert not set(ids) & {row["task_id"] for row in data["pretrain"]}


def test_held_out_paths_are_unseen_and_their_operations_are_seen(data):
    trained = [*data["pretrain"], *data["labelled"], *data["prompts"]]
    seen = {path(row) for row in of(trained, "problems")}
    held_out = {path(row) for row in of(data["held_out"], "problems")}
    assert len(held_out) > 20
    assert not seen & held_out
    signs = set("".join(seen)) - set("0123456789")
    assert signs == set("+-*/")


def test_all_labels_are_right(data):
    rows = [*data["labelled"], *data["held_out"]]
    problems = of(rows, "problems")
    checked = check_completions([r["checker"] for r in problems], [label(r) for r in problems])
    assert all(result.passed for result in checked)
    for row in of(rows, "programs"):
        checker = row["checker"]
        exec(f"{checker['prompt']}{label(row)}\n{checker['test']}\ncheck(f)", {})


def test_prompts_have_a_teacher_and_no_answer(data):
    assert {tuple(sorted(row)) for row in data["prompts"]} == {("messages", "task_id", "teacher")}
    assert all([m["role"] for m in row["messages"]] == ["user"] for row in data["prompts"])


def test_same_seed_gives_the_same_bytes_and_another_seed_another_split(tmp_path, data):
    prepare(tmp_path / "a", seed=SEED, settings=SMALL)
    prepare(tmp_path / "b", seed=SEED, settings=SMALL)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    written = (tmp_path / "a" / "held_out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == data["held_out"]
    other = make_dataset(SEED + 1, SMALL)
    assert {path(r) for r in other["held_out"]} != {path(r) for r in data["held_out"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    save_tokenizer(folder)
    save_model(folder)
    return folder


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_average_of_adapters_is_the_mean_of_the_merged_models(base, tmp_path):
    merged = []
    for number in (1, 2):
        torch.manual_seed(number)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(tmp_path / f"expert-{number}")
        save_tokenizer(tmp_path / f"expert-{number}")
        merged.append(model.merge_and_unload().state_dict())
    average([str(tmp_path / "expert-1"), str(tmp_path / "expert-2")], tmp_path / "mean")
    found = weights(tmp_path / "mean")
    differs = 0
    for name, weight in found.items():
        torch.testing.assert_close(weight, (merged[0][name] + merged[1][name]) / 2)
        differs += not torch.equal(weight, merged[0][name])
    assert differs > 4
    assert (tmp_path / "mean" / "tokenizer.json").exists()


def test_models_of_other_shapes_have_no_average(base, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(base)
    other.resize_token_embeddings(other.config.vocab_size + 8)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has other weights than"):
        average([str(base), str(tmp_path / "other")], tmp_path / "mean")


@pytest.mark.parametrize(
    "argv",
    [argv for argv in trainer_lines(README) if argv[0] != "study"],
    ids=lambda argv: f"{argv[0]} {argv[-1]}",
)
def test_every_command_of_the_trainer_is_accepted(argv, monkeypatch):
    read_trainer([word for word in argv if word != "--bf16"])  # which needs a GPU that has it


def test_the_servers_of_the_readme_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("code-lora", "math-lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        (tmp_path / name / "adapter_model.safetensors").touch()
    adapters, code, math = (read_server(argv, monkeypatch) for argv in server_lines(README))
    assert [module.name for module in adapters.adapters] == ["code", "math"]
    assert (code.port, math.port) == (8000, 8001)
