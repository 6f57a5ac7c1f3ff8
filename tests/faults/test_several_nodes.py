"""A trainer on two nodes and its teacher on a third: network namespaces, joined by a switch."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.namespaces import switched
from tests.support.server import free_port, start_server

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
STEPS = 4


@pytest.fixture
def nodes(unserved_world, tmp_path):
    """Two, and the address of a teacher on a third, which begins to load."""
    with switched(3) as (teacher, *others), contextlib.ExitStack() as life:
        # Each sequence alone: in company, which is a matter of timing, a teacher rounds otherwise.
        alone = ("--max-batch-tokens", "1", "--allow-unauthenticated")
        port, log = free_port(), tmp_path / "teacher.log"
        server = start_server(
            unserved_world.teacher, "--host", teacher.address, *alone,
            port=port, log=log, launcher=teacher.launcher,
        )  # fmt: skip
        life.callback(server.wait)
        life.callback(server.kill)
        yield others, f"http://{teacher.address}:{port}"


@pytest.fixture
def start(nodes, unserved_world, tmp_path):
    """Starts `student-trainer distill` on a node, by accelerate's launcher."""
    (_, url) = nodes
    options = {
        "model_name_or_path": unserved_world.student, "dataset_name": unserved_world.rows,
        "teacher_url": url, "top_k_logprobs": 16, "max_new_tokens": 12, "lmbda": 0.5,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant",
        "max_steps": STEPS, "logging_steps": 1, "save_strategy": "steps", "save_steps": STEPS,
        "report_to": "none", "disable_tqdm": "true",
    }  # fmt: skip
    processes = []

    def start(node, name, batch_size, *launcher):
        given = {**options, "output_dir": tmp_path / name}
        given["per_device_train_batch_size"] = batch_size
        process = subprocess.Popen(
            [*node.launcher, sys.executable, "-m", "accelerate.commands.launch", *launcher,
             "-m", "student_trainer", "distill", *(f"--{k}={v}" for k, v in given.items())],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.terminate()  # and not kill: a launcher that is killed leaves its ranks behind
    for process in processes:
        process.wait(60)


def succeeds(*processes):
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said


def steps(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if "train/loss" in entry]


@pytest.mark.slow_fault
@pytest.mark.xdist_group("networks")
def test_two_nodes_learn_what_one_process_learns(nodes, start, tmp_path):
    """Off-policy and on-policy, by DDP and by FSDP, as launched by the example's files."""
    (first, second), _ = nodes
    succeeds(start(first, "one", 8, "--cpu", "--num_processes=1"))
    weights = load_file(tmp_path / "one" / "model.safetensors")
    losses = steps(tmp_path / "one", "train/loss")
    assert len(losses) == STEPS
    assert set(steps(tmp_path / "one", "train/on_policy")) == {0, 1}
    for name in ("ddp", "fsdp2"):
        launcher = (
            f"--config_file={CONFIGS / name}.yaml", "--num_machines=2", "--num_processes=2",
            f"--main_process_ip={first.address}",
        )  # fmt: skip
        succeeds(*(start(n, name, 4, *launcher, f"--machine_rank={r}")
                   for r, n in enumerate((first, second))))  # fmt: skip
        assert steps(tmp_path / name, "train/loss") == pytest.approx(losses, rel=1e-6)
        for key, value in load_file(tmp_path / name / "model.safetensors").items():
            torch.testing.assert_close(value, weights[key], atol=1e-6, rtol=0, msg=key)
        sharded = tmp_path / name / f"checkpoint-{STEPS}" / "pytorch_model_fsdp.bin"
        assert sharded.exists() == (name == "fsdp2")
