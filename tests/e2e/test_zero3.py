"""Students that DeepSpeed's ZeRO-3 shards over two ranks, whose completions others write too."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.e2e.test_distillation import flags, history
from tests.e2e.test_vllm_rollouts import save_student
from tests.support import trainer_process
from tests.support.server import free_port, running_rollout_server
from tests.support.trainer_process import assert_same_weights
from tests.support.vllm import VLLM

# The first run on a machine compiles DeepSpeed's shared-memory operator, for minutes.
pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)
ZERO3 = {
    "zero_optimization": {
        "stage": 3, "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,  # small weights are sharded too
    },
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip
LORA = {"use_peft": "true", "lora_r": 4}


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def rollout_url(student_folder, tmp_path_factory):
    """A server that loads adapters."""
    port, log = free_port(), tmp_path_factory.mktemp("logs") / "server.log"
    with running_rollout_server(student_folder, port=port, log=log, lora_rank=8):
        yield f"http://127.0.0.1:{port}"


def argv_of(world, output, student, *, ranks=1, **options):
    settings = {
        "model_name_or_path": student, "teacher_url": world.url, "top_k_logprobs": 16,
        "lmbda": 1, "beta": 0, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
        "per_device_train_batch_size": 8 // ranks, **options,
    }  # fmt: skip
    return ["distill", *flags(world, output, **settings)]


def train_sharded(world, output, student, folder, **options):
    """Train on two ranks with ZeRO-3."""
    path = folder / "zero3.json"
    path.write_text(json.dumps(ZERO3))
    argv = argv_of(world, output, student, ranks=2, deepspeed=path, **options)
    trainer_process.train_on_two_ranks(argv)
    return argv


def logged(output, name):
    return [row[f"train/{name}"] for row in history(output) if f"train/{name}" in row]


def assert_learned_the_same(one, two, weights="model.safetensors"):
    np.testing.assert_allclose(logged(two, "divergence"), logged(one, "divergence"), rtol=1e-4)
    ours, theirs = load_file(one / weights), load_file(two / weights)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, atol=1e-4, err_msg=name)


WRITERS = [
    pytest.param("student", id="itself"),
    pytest.param("vllm", id="vllm-beside", marks=VLLM),
    pytest.param("server", id="server", marks=VLLM),
]


@pytest.fixture
def written_by(request):
    """The flags that say who writes the completions."""

    def flags_of(writer):
        if writer == "server":
            return {"rollout_url": request.getfixturevalue("rollout_url")}
        return {"rollout_engine": "vllm"} if writer == "vllm" else {}

    return flags_of


@pytest.mark.parametrize("writer", WRITERS)
def test_two_ranks_learn_what_one_process_learns(
    world, student_folder, written_by, tmp_path, writer
):
    one, two, options = tmp_path / "one", tmp_path / "two", written_by(writer)
    trainer_process.train(argv_of(world, one, student_folder, **options))
    train_sharded(world, two, student_folder, tmp_path, **options)
    assert list((two / "checkpoint-6").glob("global_step*/zero_pp_rank_1_*"))  # it was sharded
    assert_learned_the_same(one, two)
    assert all(drift < 1e-5 for drift in logged(two, "rollout_drift"))
    assert bool(logged(two, "rollout_drift")) == (writer != "student")


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make .venv/vllm")
def test_adapters_go_alone_and_teach_what_one_process_learns(
    world, student_folder, rollout_url, tmp_path
):
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"rollout_url": rollout_url, **LORA}
    trainer_process.train(argv_of(world, one, student_folder, **options))
    train_sharded(world, two, student_folder, tmp_path, **options)
    assert_learned_the_same(one, two, "adapter_model.safetensors")
    sent = logged(two, "rollout_bytes")
    assert max(sent[1:]) < sent[0] / 4
    assert all(drift < 1e-5 for drift in logged(two, "rollout_drift"))


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make .venv/vllm")
@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "adapters"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    world, student_folder, rollout_url, tmp_path, lora
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"rollout_url": rollout_url, "lr_scheduler_type": "constant", **lora}
    train_sharded(world, whole, student_folder, tmp_path, **options)
    train_sharded(world, cut, student_folder, tmp_path, max_steps=3, **options)
    train_sharded(world, cut, student_folder, tmp_path, resume_from_checkpoint="auto", **options)
    assert logged(cut, "divergence") == logged(whole, "divergence")
    assert_same_weights(whole, cut, "adapter_model.safetensors" if lora else "model.safetensors")
