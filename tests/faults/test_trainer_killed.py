"""`kill -9` of the trainer; afterwards the same command ends with the same weights."""

import os
import signal
import time

import pytest

from student_trainer.commands.main import main
from tests.support.trainer_process import assert_same_weights, checkpoints, running

# What the trainer is about to do when it dies.
MOMENTS = {
    "half of a checkpoint is written": ("open", "_unfinished/checkpoint-4/trainer_state.json"),
    "a whole one is written beside": ("os.rename", "_unfinished/checkpoint-4"),
    "half of an old one is deleted": ("os.remove", "model.safetensors"),
    "the trained model is written": ("open", "out/config.json"),
}


def goes_on_to_the_same_weights(whole, words, output):
    for step in checkpoints(output):  # none is a half one
        folder = f"checkpoint-{step}"
        expected = {file.name for file in (whole / folder).iterdir()}
        assert {file.name for file in (output / folder).iterdir()} == expected
        assert_same_weights(whole / folder, output / folder)
    assert main(words) == 0
    assert_same_weights(whole, output)
    assert checkpoints(output) == [8, 10]
    assert not list((output / "_unfinished").glob("*"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_files_change(command, serving, whole, tmp_path, moment):
    output = tmp_path / "out"
    with serving() as url:
        words = command(url, output)
        with running(words, killed_at=MOMENTS[moment]) as process:
            process.join()
        assert process.exitcode == -signal.SIGKILL
        goes_on_to_the_same_weights(whole[0], words, output)


def test_killed_in_a_step_with_rollouts_in_flight(command, serving, whole, tmp_path):
    def on_request(number):
        if 4 in checkpoints(tmp_path) and not died:
            died.append(number)
            time.sleep(0.05)  # of the step that trains meanwhile
            os.kill(process.pid, signal.SIGKILL)

    died = []
    with serving(on_request) as url:
        words = command(url, tmp_path)
        with running(words) as process:
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert 10 not in checkpoints(tmp_path)
        goes_on_to_the_same_weights(whole[0], words, tmp_path)
