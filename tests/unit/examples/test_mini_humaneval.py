"""The embedded experiment's data: its split, its labels, its noise and its rendering."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.mini_humaneval.prepare import Dataset, make_dataset, prepare
from examples.mini_humaneval.quickstart import STUDY
from examples.mini_humaneval.settings import SETTINGS
from examples.mini_humaneval.tasks import (
    OPERATIONS,
    corrupted_body,
    is_held_out,
    random_task,
    run_on_probes,
)

SEED = 3
SMALL = replace(
    SETTINGS,
    pretrain_rows=600,
    warmup_rows=200,
    labelled_rows=100,
    prompt_rows=300,
    held_out_rows=120,
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return make_dataset(SEED, SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, seed=SEED, settings=SMALL)
    return folder


def operations_in(row: dict[str, Any]) -> frozenset[str]:
    """The operations that a task id such as `above3?add2:square` names."""
    steps = row["task_id"].split("?")[-1].replace(":", ">").split(">")
    names = {operation.name for operation in OPERATIONS}
    return frozenset(
        next(n for n in names for c in _constants(n) if n + c == step) for step in steps
    )


def _constants(name: str) -> tuple[str, ...]:
    return next(operation.constants for operation in OPERATIONS if operation.name == name)


def passes(row: dict[str, Any], body: str) -> bool:
    """Return whether checker.prompt + body + test runs through, joined as HumanEval does it."""
    checker = row["checker"]
    program = f"{checker['prompt']}{body}\n{checker['test']}\ncheck({checker['entry_point']})"
    try:
        exec(program, {})
    except AssertionError:
        return False
    return True


def label(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def test_each_file_has_the_rows_that_the_settings_ask_for(data):
    assert {name: len(rows) for name, rows in data.files().items()} == {
        "teacher_pretrain": 600,
        "student_warmup": 200,
        "labelled": 100,
        "prompts": 300,
        "held_out": 120,
    }


def test_tasks_are_distinct_within_and_across_labels_prompts_and_evaluation(data):
    ids = [row["task_id"] for row in [*data.labelled, *data.prompts, *data.held_out]]
    assert len(set(ids)) == len(ids) == 520
    assert not set(ids) & {row["task_id"] for row in data.teacher_pretrain}


def test_descriptions_are_distinct_where_tasks_are(data):
    users = [r["messages"][0]["content"] for r in [*data.labelled, *data.prompts, *data.held_out]]
    assert len(set(users)) == 520


def test_held_out_compositions_are_unseen_in_all_training_files(data):
    trained = [*data.teacher_pretrain, *data.student_warmup, *data.labelled, *data.prompts]
    seen = {operations_in(row) for row in trained}
    held_out = {operations_in(row) for row in data.held_out}
    assert len(held_out) > 20
    assert not seen & held_out


def test_every_operation_of_a_held_out_task_is_seen_in_labels_or_prompts(data):
    trained = frozenset[str]().union(*(operations_in(r) for r in [*data.labelled, *data.prompts]))
    held_out = frozenset[str]().union(*(operations_in(row) for row in data.held_out))
    assert held_out <= trained


def test_noise_brings_no_held_out_composition_into_the_labels(data):
    bodies = {label(row) for row in data.held_out}
    assert not bodies & {label(row) for row in data.labelled}


@pytest.mark.parametrize("seed", range(8))
def test_each_seed_leaves_every_operation_partners_on_both_sides(seed):
    for operation in OPERATIONS:
        pairs = [frozenset({operation.name, other.name}) for other in OPERATIONS]
        held_out = sum(is_held_out(pair, seed) for pair in pairs)
        assert 1 <= held_out <= len(OPERATIONS) // 4


def test_a_single_step_is_never_held_out():
    assert not any(is_held_out(frozenset({o.name}), s) for o in OPERATIONS for s in range(8))


def test_reference_solutions_pass_their_own_tests(data):
    rows = [*data.held_out, *data.teacher_pretrain]
    assert sum(passes(row, label(row)) for row in rows) == len(rows) == 720


def test_exactly_the_noise_share_of_the_labels_fails_its_tests(data):
    wrong = [row for row in data.labelled if not passes(row, label(row))]
    assert len(wrong) == 30


def test_corrupted_bodies_run_and_give_another_answer():
    rng = random.Random(0)
    for _ in range(200):
        task = random_task(rng, single_share=0.2, branch_share=0.4)
        wrong = run_on_probes(task.kind, corrupted_body(task, rng, SEED))
        assert wrong != run_on_probes(task.kind, task.body())


def test_pretraining_never_speaks_in_the_target_style(data):
    assert all("Take the" in row["messages"][0]["content"] for row in data.labelled)
    assert not any("Take the" in row["messages"][0]["content"] for row in data.teacher_pretrain)


def test_prompt_rows_carry_no_answer(data):
    assert all([m["role"] for m in row["messages"]] == ["user"] for row in data.prompts)
    assert not any("checker" in row for row in data.prompts)


def test_same_seed_gives_the_same_bytes(folder, tmp_path):
    prepare(tmp_path, seed=SEED, settings=SMALL)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {str(path) for path in files} >= {
        "held_out.jsonl",
        "teacher_init/model.safetensors",
        "student_init/tokenizer.json",
    }
    assert [p for p in files if (folder / p).read_bytes() != (tmp_path / p).read_bytes()] == []


def test_another_seed_gives_another_split(data):
    other = make_dataset(SEED + 1, SMALL)
    held_out = {operations_in(row) for row in data.held_out}
    assert not held_out & {operations_in(row) for row in other.held_out}


def test_generation_mask_covers_exactly_the_body_and_its_end(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "student_init")
    longest = yaml.safe_load(STUDY.read_text())["defaults"]["distill"]["max_new_tokens"]
    for line in (folder / "labelled.jsonl").read_text().splitlines():
        row = json.loads(line)
        rendered = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        learned = [
            token
            for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
            if mask
        ]
        assert tokenizer.decode(learned) == label(row) + tokenizer.eos_token
        assert learned[-1] == tokenizer.eos_token_id
        assert len(learned) <= longest


def test_prompt_and_completion_tokens_add_up_to_the_whole_conversation(folder, data):
    tokenizer = AutoTokenizer.from_pretrained(folder / "student_init")
    longest = 0
    for row in data.teacher_pretrain:
        user = row["messages"][:1]
        prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert whole == prompt + label(row) + tokenizer.eos_token
        parts = [tokenizer(text)["input_ids"] for text in (prompt, label(row) + "<|end|>")]
        assert tokenizer(whole)["input_ids"] == parts[0] + parts[1]
        longest = max(longest, len(parts[0] + parts[1]))
    assert longest <= 80


def test_models_load_and_share_one_vocabulary(folder):
    sizes = {}
    for name in ("teacher_init", "student_init"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
        sizes[name] = model.num_parameters()
    assert sizes["teacher_init"] > 3.5 * sizes["student_init"]
