"""Kills, a full disk and SIGTERM, really caused; afterwards the same command goes on exactly."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from student_trainer.cli import main
from tests.e2e.test_distillation import assert_same_weights, flags

STEPS = 24


def command(world, output, **options):
    plain = {
        "teacher_url": world.url, "top_k_logprobs": 16, "lmbda": 1, "rollout_staleness": 1,
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
        "resume_from_checkpoint": "auto", **options,
    }  # fmt: skip
    return ["distill", *flags(world, output, **plain)]


def until(condition, process):
    """Wait, from outside the run, for what its folder shows."""
    while not condition():
        assert process.poll() is None, "the run ended before the fault"
        time.sleep(0.0005)


@contextmanager
def started(words, *, launcher=()):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "student_trainer", *words], env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert main(command(world, output)) == 0
    return output


def checkpoints(output):
    return sorted(path.name for path in output.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "moment", ["_unfinished/checkpoint-4", "_unfinished/checkpoint-4/optimizer.pt", "checkpoint-6"]
)
def test_a_killed_run_goes_on_to_the_same_weights(world, whole, tmp_path, moment):
    with started(command(world, tmp_path)) as process:
        until((tmp_path / moment).exists, process)
        process.kill()
        process.wait()
    for name in checkpoints(tmp_path):  # none is half-written
        assert (tmp_path / name / "trainer_state.json").exists()
    assert main(command(world, tmp_path)) == 0
    assert_same_weights(whole, tmp_path, tolerance=0)
    assert checkpoints(tmp_path) == [f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"]
    assert not list((tmp_path / "_unfinished").glob("*"))


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint(world, whole, tmp_path, capsys):
    words = command(world, tmp_path)
    with started(words) as process:
        until((tmp_path / "checkpoint-2").exists, process)
        process.kill()
        process.wait()
    before = checkpoints(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 1
    assert f"could not be written in {tmp_path}" in said
    assert "lower --save_total_limit" in said
    assert checkpoints(tmp_path) == before
    assert main(words) == 0
    assert_same_weights(whole, tmp_path, tolerance=0)


TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")


def test_sigterm_saves_and_exits_0(world, whole, tmp_path):
    words = command(world, tmp_path)
    with started(words) as process:
        until((tmp_path / "checkpoint-2").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert f"checkpoint-{STEPS}" not in checkpoints(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert main(words) == 0
    assert_same_weights(whole, tmp_path, tolerance=0)


def test_two_processes_told_to_end_save_the_same_step(world, tmp_path):
    options = {"per_device_train_batch_size": 4}
    for name in ("whole", "parts"):
        words = command(world, tmp_path / name, **options)
        if name == "parts":
            with started(words, launcher=TWO) as process:
                until((tmp_path / name / "checkpoint-2").exists, process)
                process.send_signal(signal.SIGTERM)
                process.wait(60)  # torchrun tells of the signal, whatever its processes return
            assert f"checkpoint-{STEPS}" not in checkpoints(tmp_path / name)
            for checkpoint in (tmp_path / name).glob("checkpoint-*"):
                assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {
                    file.name for file in checkpoint.iterdir()
                }
        with started(words, launcher=TWO) as process:
            assert process.wait(120) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", tolerance=0)
