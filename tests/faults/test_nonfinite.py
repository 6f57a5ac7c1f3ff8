"""Losses and gradients that are not finite, from weights that a bad disk or an overflow broke."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.commands.main import main
from student_trainer.data.order import TrainingOrder
from student_trainer.training.nonfinite import load_batch
from tests.support.trainer_process import assert_same_weights, checkpoints, two_ranks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LETTER = "Q"  # in one row alone
BAD_STEP = 3


@pytest.fixture
def student(unserved_world, tmp_path):
    """Makes a folder of the student with other weights."""

    def changed(change):
        weights = load_file(unserved_world.student / "model.safetensors")
        change(weights)
        folder = tmp_path / "student"
        folder.mkdir()
        for file in unserved_world.student.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return changed


@pytest.fixture
def letter(unserved_world):
    return AutoTokenizer.from_pretrained(unserved_world.student).convert_tokens_to_ids(LETTER)


@pytest.fixture
def broken(student, letter):
    """The student without a finite embedding of the letter."""
    return student(lambda weights: weights[EMBEDDING][letter].fill_(float("nan")))


@pytest.fixture
def rows(unserved_world, tmp_path):
    """The world's, and the letter in one of them, which step 3 learns."""
    lines = unserved_world.rows.read_text().splitlines()
    [micro_batch] = TrainingOrder(len(lines), 8, 1, seed=42).micro_batches(BAD_STEP - 1)
    row = json.loads(lines[micro_batch[0]])
    row["messages"][0]["content"] += LETTER
    lines[micro_batch[0]] = json.dumps(row)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def sft(student, rows, output, **options):
    """Words of a run over all rows, once."""
    settings = {
        "model_name_or_path": student, "dataset_name": rows, "output_dir": output,
        "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "report_to": "none",
        "resume_from_checkpoint": "auto", "disable_tqdm": "true", **options,
    }  # fmt: skip
    return ["sft", *(f"--{name}={value}" for name, value in settings.items())]


def skipped(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    name = "train/skipped_steps"
    return {entry["step"]: entry[name] for entry in history if name in entry}


def test_a_loss_that_is_nan_stops_with_its_batch(broken, rows, letter, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(sft(broken, rows, output)) == 1
    file = output / "nonfinite-step3-rank0.npz"
    said = capsys.readouterr().err
    assert "step 3: the loss is nan" in said
    assert checkpoints(output) == [1, 2]
    assert f"Its batch is in {file}" in said
    [micro_batch] = load_batch(file)
    assert len(micro_batch) == 8
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint-2")
    for item in micro_batch:  # as it was in that step
        ids = torch.from_numpy(item.sample.token_ids.astype("int64"))
        finite = bool(model(ids[None]).logits.isfinite().all())
        assert finite is (letter not in ids)
    assert sum(letter in item.sample.token_ids for item in micro_batch) == 1


def test_a_batch_that_cannot_be_kept_hides_no_loss_that_is_nan(broken, rows, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "nonfinite-step3-rank0.npz").mkdir(parents=True)
    assert main(sft(broken, rows, output)) == 1
    said = capsys.readouterr().err
    assert "step 3: the loss is nan" in said
    assert f"could not be kept in {output}/nonfinite-step3-rank0.npz: Is a directory" in said


def test_a_step_that_is_nan_is_left_out_and_counted(broken, rows, letter, tmp_path):
    output = tmp_path / "out"
    assert main(sft(broken, rows, output, nonfinite="skip")) == 0
    assert skipped(output) == {BAD_STEP: 1}
    assert_same_weights(output / "checkpoint-2", output / "checkpoint-3")
    trained = load_file(output / "model.safetensors")
    assert trained[EMBEDDING][letter].isnan().all()
    trained[EMBEDDING][letter] = 0.0
    assert all(value.isfinite().all() for value in trained.values())


def test_a_gradient_that_overflows_stops_though_the_loss_is_finite(
    student, unserved_world, tmp_path, capsys
):
    def scaled_apart(weights):  # the same logits, from tiny states and huge weights
        weights["model.norm.weight"] *= 1e-30
        weights[HEAD] *= 1e30

    assert main(sft(student(scaled_apart), unserved_world.rows, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "step 1: the loss is nan" not in said
    assert "the norm of the gradient inf" in said
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert left == {"training_inputs.json", "nonfinite-step1-rank0.npz"}


@pytest.mark.slow_fault
def test_all_ranks_stop_or_skip_together(broken, rows, tmp_path):
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0}

    def in_two(output, **options):
        words = sft(broken, rows, output, per_device_train_batch_size=4, **plain, **options)
        with two_ranks(words) as ranks:
            for rank in ranks:
                rank.join(120)
        return [rank.exitcode for rank in ranks]

    output = tmp_path / "two"
    assert in_two(output) == [1, 1]
    assert checkpoints(output) == [1, 2]
    files = {file.name for file in output.glob("nonfinite-*")}
    assert files == {f"nonfinite-step3-rank{rank}.npz" for rank in (0, 1)}
    assert in_two(output, nonfinite="skip") == [0, 0]
    assert skipped(output) == {BAD_STEP: 1}
    assert main(sft(broken, rows, tmp_path / "one", nonfinite="skip", **plain)) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=0, equal_nan=True, msg=name)
