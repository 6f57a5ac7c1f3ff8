"""Two ranks that share a model with experts, and go on from a checkpoint of it."""

import shutil

import pytest

from tests.support.models import save_model, save_tokenizer
from tests.support.trainer_process import assert_same_weights, train_on_two_ranks


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    save_tokenizer(folder)
    save_model(
        folder, family="qwen3_moe", hidden_size=16, moe_intermediate_size=16, head_dim=8,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_go_on_with_all_weights_of_a_checkpoint(unserved_world, experts, tmp_path, how):
    """To the bit, and to the best model, which is the last one here."""
    options = {
        "model_name_or_path": experts, "dataset_name": unserved_world.rows, "output_dir": tmp_path,
        "eval_dataset_name": unserved_world.held_out, "max_steps": 4, "learning_rate": 0.01,
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": "true", "per_device_train_batch_size": 4, "use_cpu": "true",
        "report_to": "none", "disable_tqdm": "true", "resume_from_checkpoint": "auto",
        "logging_steps": 1,
    }  # fmt: skip
    argv = ["sft", *(f"--{name}={value}" for name, value in options.items())]
    argv += ["--fsdp"] if how == "fsdp" else []
    train_on_two_ranks(argv)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "checkpoint-4", whole)
    assert_same_weights(whole, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "model.safetensors").unlink()
    train_on_two_ranks(argv)
    assert_same_weights(whole, tmp_path / "checkpoint-4")
    assert_same_weights(whole, tmp_path)
    sharded = (whole / "pytorch_model_fsdp.bin").exists()
    assert sharded == (how == "fsdp")
