"""The pruned coder: its questions, its student, what it learns from, its study, and its page."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.pruned_coder.answers import answered
from examples.pruned_coder.page import cell_rows, difference_rows, filled
from examples.pruned_coder.prepare import make_dataset
from examples.pruned_coder.prune import prune
from student_trainer.evaluation.checkers import check_completions
from student_trainer.study.flags import check_flags
from student_trainer.study.plan import make_plan
from student_trainer.study.spec import load_study
from tests.support.models import save_model, save_tokenizer

EXAMPLE = Path(__file__).parents[3] / "examples" / "pruned_coder"


@pytest.fixture(scope="module")
def data():
    return make_dataset(labelled=40, held_out=20)


@pytest.fixture(scope="module")
def study():
    return load_study(EXAMPLE / "study.yaml")


def test_questions_are_asked_once_and_their_labels_are_right(data):
    assert {name: len(rows) for name, rows in data.items()} == {
        "labelled": 40, "questions": 40, "held_out": 20,
    }  # fmt: skip
    rows = [*data["labelled"], *data["held_out"]]
    assert len({row["task_id"] for row in rows}) == 60
    labels = [row["messages"][-1]["content"] for row in rows]
    checked = check_completions([row["checker"] for row in rows[:6]], labels[:6])
    assert all(result.passed for result in checked)
    assert {tuple(m["role"] for m in row["messages"]) for row in data["questions"]} == {
        ("system", "user")
    }
    assert data == make_dataset(labelled=40, held_out=20)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A model of four layers whose embedding is not its output layer."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    save_tokenizer(folder)
    save_model(folder, family="qwen2", num_hidden_layers=4, tie_word_embeddings=False)
    return folder


@pytest.mark.parametrize(("layers", "kept"), [(2, [0, 3]), (None, [0, 1, 2, 3])])
def test_a_student_has_some_layers_and_one_embedding(untied, tmp_path, layers, kept):
    prune(str(untied), tmp_path / "student", layers)
    whole = AutoModelForCausalLM.from_pretrained(untied).state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    found = model.state_dict()
    assert len(model.model.layers) == len(kept)
    assert torch.equal(found["model.embed_tokens.weight"], whole["lm_head.weight"])
    assert torch.equal(found["lm_head.weight"], whole["lm_head.weight"])
    for place, number in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(found[name.format(place)], whole[name.format(number)])
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template


def test_too_many_layers_are_refused(untied, tmp_path):
    with pytest.raises(ValueError, match="--layers 9: the model has 4"):
        prune(str(untied), tmp_path / "student", 9)


def test_answers_are_learned_in_order_and_without_those_that_were_cut(data):
    questions = data["questions"][:3]
    samples = [
        {"task_id": row["task_id"], "completion": f"answer {number}", "truncated": number == 1}
        for number, row in enumerate(questions)
    ]
    rows = answered(questions, samples[::-1])
    assert [row["task_id"] for row in rows] == [questions[0]["task_id"], questions[2]["task_id"]]
    assert [row["messages"][-1] for row in rows] == [
        {"role": "assistant", "content": "answer 0"},
        {"role": "assistant", "content": "answer 2"},
    ]


def test_humaneval_may_be_a_file(tmp_path, monkeypatch):
    rows = [{"task_id": "HumanEval/0", "prompt": "def f():\n"}]
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(rows[0]).encode() + b"\n"))
    monkeypatch.setenv("PRUNED_CODER_HUMANEVAL", str(file))
    monkeypatch.setattr(sys, "argv", ["humaneval", f"--output_dir={tmp_path / 'out'}"])
    runpy.run_module("examples.pruned_coder.humaneval", run_name="__main__")
    lines = (tmp_path / "out/humaneval.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_all_students_have_the_same_updates_but_those_of_equal_time(study):
    check_flags(study)
    assert study.drop_weights
    assert study.metrics() == ["pass@1", "divergence", "perplexity"]
    tables = {table.name: table.cells for table in study.tables}
    models = {"teacher_raw", "teacher_sft", "student_before", "healed"}
    pruned = [study.cells[name] for name in tables["pruned"] if name not in models]
    others = [name for name in (*tables["healing"], *tables["teachers"]) if name not in models]
    healed = [study.cells[name] for name in dict.fromkeys(others)]
    assert (len(pruned), len(healed)) == (5, 8)
    for students in (pruned, healed):
        for key in ("max_steps", "per_device_train_batch_size", "model_name_or_path"):
            assert len({cell.flags[key] for cell in students}) == 1
    rates = {(bool(c.flags.get("use_peft")), c.flags["learning_rate"]) for c in healed}
    assert rates == {(False, 1e-4), (True, 1e-3)}


def test_models_and_questions_are_made_once_and_students_for_each_seed(study):
    plan = make_plan(study, study.seeds)
    shared = (
        "data",
        "teacher_raw",
        "student_before",
        "answers",
        "healed",
        "teacher_sft",
        "answers_sft",
    )
    for name in shared:
        assert {plan.folder_of[name, seed] for seed in study.seeds} == {f"shared/{name}"}
    assert len({plan.folder_of["gkd", seed] for seed in study.seeds}) == len(study.seeds)


@pytest.fixture
def results():
    one = {"values": {"0": 0.25, "1": 0.75}, "mean": 0.5, "interval": [0.4, 0.6], "n": 2}
    large = {"values": {"all": 1234.5}, "mean": 1234.5, "interval": None, "n": 1}
    difference = {"cell": "seq_kd", "base": "sft", "mean": -0.1, "interval": [-0.3, 0.1], "n": 2}
    return {
        "cells": {"sft": one, "healed": large},
        "other_metrics": {"divergence": {"sft": one, "healed": large}},
        "differences": {"healing": [difference], "healing_divergence": [difference]},
    }


def test_a_table_of_the_page_has_what_is_measured(study, results):
    names = ["healing", "healing_divergence"]
    assert cell_rows(study, results, names) == [
        "| model | pass@1 | divergence | seeds |",
        "| --- | --- | --- | --- |",
        "| `healed` | 1,234 | 1,234 | one for all |",
        "| `sft` | 0.500 ± 0.100 | 0.500 ± 0.100 | 2 |",
    ]
    assert difference_rows(study, results, names)[2:] == [
        "| `seq_kd` − `sft` | -0.100 ± 0.200 | -0.100 ± 0.200 | 2 |"
    ]


def test_tables_are_filled_between_their_comments_alone(study, results):
    mark = "<!-- cells healing_divergence -->"
    page = f"Before.\n\n{mark}\nold\n<!-- end -->\n\nAfter.\n"
    once = filled(page, study, results, EXAMPLE)
    assert once.startswith(f"Before.\n\n{mark}\n| model | divergence | seeds |\n")
    assert once.endswith("| 2 |\n<!-- end -->\n\nAfter.\n")
    assert filled(once, study, results, EXAMPLE) == once
