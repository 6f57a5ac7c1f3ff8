"""The grouping of samples into micro-batches, padded or packed, changes no gradient."""

import json
import random
import string

import pytest

from student_trainer.commands.main import main
from tests.e2e.test_distillation import (
    assert_same_weights,
    distill,
    flags,
    history,
    weights,
)
from tests.support.models import LONGROPE, save_model, save_tokenizer
from tests.support.trainer_process import train_on_two_ranks

# One step of plain gradient descent: the weights differ by what the gradients do.
PLAIN = {
    "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_grad_norm": 0,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
}  # fmt: skip
WAYS = {
    "many": {"max_tokens_per_batch": 100},
    "one": {"max_tokens_per_batch": 10_000},
    "packed": {"packing": "on"},
    "packed, many": {"packing": "on", "max_tokens_per_batch": 100},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Short and long rows, so that ranks need unequal numbers of micro-batches."""
    rng = random.Random(3)

    def turn(role, length):
        return {"role": role, "content": "".join(rng.choices(string.ascii_lowercase, k=length))}

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"messages": [turn("user", 4), turn("assistant", rng.choice((5, 9, 80)))]}
        for _ in range(48)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sft(world, output, **options):
    return main(["sft", *flags(world, output, **{**PLAIN, **options})])


@pytest.fixture(scope="module")
def ungrouped(world, rows, tmp_path_factory):
    """All samples of a step in one padded batch."""
    output = tmp_path_factory.mktemp("ungrouped")
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert sft(world, output, dataset_name=rows, max_steps=1, **whole) == 0
    return output


@pytest.mark.parametrize("way", WAYS)
def test_one_step_has_the_gradient_of_the_ungrouped_batch(world, rows, ungrouped, tmp_path, way):
    assert sft(world, tmp_path, dataset_name=rows, max_steps=1, **WAYS[way]) == 0
    assert_same_weights(ungrouped, tmp_path, tolerance=1e-6)
    ours, theirs = history(tmp_path)[0], history(ungrouped)[0]
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
    assert (ours["train/padding_fraction"] == 0) == ("packed" in way)
    assert ours["train/padding_fraction"] <= theirs["train/padding_fraction"]


@pytest.mark.parametrize("way", ["many", "packed, many"])
def test_everything_else_goes_on_as_it_does_padded(world, tmp_path, way):
    options = {
        **PLAIN, "lmbda": 0.5, "sft_weight": 0.2, "request_student_top_m": 4, "use_peft": "true",
        "lora_r": 4, "gradient_checkpointing": "true", "eval_dataset_name": world.held_out,
        "eval_strategy": "steps", "eval_steps": 4, "include_num_input_tokens_seen": "true",
    }  # fmt: skip
    assert distill(world, tmp_path / "padded", **options) == 0
    assert distill(world, tmp_path / "other", **options, **WAYS[way]) == 0
    padded, other = history(tmp_path / "padded"), history(tmp_path / "other")
    assert [entry["step"] for entry in other] == [entry["step"] for entry in padded]
    names = {
        "train/loss",
        "eval/loss",
        "train/cross_entropy",
        "train/student_top_k_mass",
        "train/on_policy",
    }
    for a, b in zip(padded, other, strict=True):
        for name in names & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
    for name in ("train/total_flos", "num_input_tokens_seen"):  # padding is counted
        assert 0 < other[-1][name] <= padded[-1][name]


def test_two_processes_with_unequal_lengths_equal_one(world, rows, tmp_path):
    budget = {**PLAIN, "dataset_name": rows, "max_tokens_per_batch": 100, "max_steps": 3}
    assert sft(world, tmp_path / "one", **budget) == 0
    words = flags(world, tmp_path / "two", **{**budget, "per_device_train_batch_size": 2})
    train_on_two_ranks(["sft", *words])
    assert_same_weights(tmp_path / "one", tmp_path / "two", tolerance=2e-5)


def test_positions_of_long_sequences_stay_a_ranks_own(world, rows, tmp_path):
    """Rows shorter and longer than the original length meet on different ranks."""
    student = tmp_path / "longrope"
    save_tokenizer(student)
    save_model(student, family="phi3", **LONGROPE)
    options = {**PLAIN, "model_name_or_path": student, "dataset_name": rows, "max_steps": 4}
    options |= {"learning_rate": 0.1, "gradient_accumulation_steps": 1}
    assert sft(world, tmp_path / "one", **{**options, "per_device_train_batch_size": 2}) == 0
    words = flags(world, tmp_path / "two", **{**options, "per_device_train_batch_size": 1})
    train_on_two_ranks(["sft", *words])
    assert_same_weights(tmp_path / "one", tmp_path / "two", tolerance=2e-5)


def test_a_repeated_run_ends_with_the_same_weights_to_the_bit(world, rows, tmp_path):
    for name in ("first", "second"):
        assert sft(world, tmp_path / name, dataset_name=rows, max_steps=3, **WAYS["many"]) == 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(value.equal(second[name]) for name, value in first.items())
