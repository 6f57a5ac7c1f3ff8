"""SIGTERM: the step under way is finished, a checkpoint is written, and the exit code is 0."""

import os
import signal
import time

from student_trainer.cli import main
from tests.support.trainer_process import assert_same_weights, checkpoints, running, two_ranks

ONLY_THEN = {"save_steps": 100}  # no checkpoint but that of the signal and the last


def test_sigterm_saves_and_exits_0(command, serving, whole, tmp_path):
    def on_request(number):
        if number == whole[1] // 2:
            os.kill(process.pid, signal.SIGTERM)

    with serving(on_request) as url:
        words = command(url, tmp_path, **ONLY_THEN)
        with running(words) as process:
            process.join(60)
        assert process.exitcode == 0
        [step] = checkpoints(tmp_path)
        assert 0 < step < 10
        assert not (tmp_path / "model.safetensors").exists()
        assert main(words) == 0
    assert_same_weights(whole[0], tmp_path)


def test_a_second_sigterm_ends_at_once(command, serving, whole, tmp_path):
    def on_request(number):
        if number == whole[1] // 2:
            while process.is_alive():  # without this answer the step does not end
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(0.1)

    with serving(on_request) as url, running(command(url, tmp_path, **ONLY_THEN)) as process:
        process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert checkpoints(tmp_path) == []


def test_all_ranks_save_the_same_step_when_one_is_told(command, serving, whole, tmp_path):
    def in_two(url, output):
        words = command(url, output, per_device_train_batch_size=4, **ONLY_THEN)
        with two_ranks(words) as ranks:
            told[:] = [ranks[1].pid]
            for rank in ranks:
                rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0, 0]

    def on_request(number):
        if number == whole[1] // 2 and not checkpoints(tmp_path / "parts"):
            os.kill(told[0], signal.SIGTERM)

    told = []
    with serving() as url:
        in_two(url, tmp_path / "whole")
    with serving(on_request) as url:
        in_two(url, tmp_path / "parts")
        [step] = checkpoints(tmp_path / "parts")
        assert 0 < step < 10
        files = {file.name for file in (tmp_path / "parts" / f"checkpoint-{step}").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", "ahead-0.npz", "ahead-1.npz"} <= files
        in_two(url, tmp_path / "parts")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
