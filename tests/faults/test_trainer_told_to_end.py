"""SIGTERM and Ctrl-C: the step under way is finished, a checkpoint saved, the exit code is 0."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

import pytest
import yaml

from student_trainer.commands.main import main
from tests.support.trainer_process import assert_same_weights, checkpoints, running, two_ranks

ONLY_THEN = {"save_steps": 100}  # no checkpoint but that of the signal and the last


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_told_run_saves_and_exits_0(command, serving, whole, tmp_path, told):
    def on_request(number):
        if number == whole[1] // 2:
            os.kill(process.pid, told)

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


def test_sigterm_does_not_wait_for_a_teacher_that_hangs(command, serving, whole, tmp_path):
    hangs = threading.Event()

    def on_request(number):
        if number == whole[1] // 2:
            os.kill(process.pid, signal.SIGTERM)
            hangs.set()
        if hangs.is_set():
            time.sleep(120)

    with serving(on_request) as url, running(command(url, tmp_path, **ONLY_THEN)) as process:
        process.join(60)
        assert process.exitcode == 0
    [step] = checkpoints(tmp_path)
    assert 0 < step < 10
    with serving() as url:
        assert main(command(url, tmp_path, **ONLY_THEN)) == 0
    assert_same_weights(whole[0], tmp_path)


@pytest.mark.parametrize(
    ("told", "code"),
    [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)],
    ids=["sigterm", "ctrl-c"],
)
def test_told_a_second_time_a_run_ends_at_once(command, serving, tmp_path, told, code):
    """While step 2 waits for its scores, those of request 4; request 5 is of step 3."""

    def on_request(number):
        with contextlib.suppress(ProcessLookupError):  # then it has ended
            while number >= 4:
                os.kill(process.pid, told if number == 5 else 0)
                time.sleep(0.05)

    with serving(on_request) as url, running(command(url, tmp_path, **ONLY_THEN)) as process:
        process.join(60)
    assert process.exitcode == code
    assert checkpoints(tmp_path) == []


def test_sigterm_while_the_trained_model_is_written_leaves_it_whole(
    command, serving, whole, tmp_path
):
    output = tmp_path / "out"
    at = ("open", "out/config.json")
    with serving() as url, running(command(url, output), killed_at=at, by=signal.SIGTERM) as run:
        run.join(60)
    assert run.exitcode == 0
    assert_same_weights(whole[0], output)
    names = [{file.name for file in folder.iterdir()} for folder in (whole[0], output)]
    assert names[0] - names[1] == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.slow_fault
def test_all_ranks_save_the_same_step_when_one_is_told(command, serving, whole, tmp_path):
    def in_two(url, output):
        words = command(url, output, per_device_train_batch_size=4, **ONLY_THEN)
        with two_ranks(words) as ranks:
            told[:] = [ranks[1].pid]
            for rank in ranks:
                rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0, 0]

    def on_request(number):
        if number == whole[1] and not checkpoints(tmp_path / "parts"):  # each rank asks as often
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


def test_a_cell_that_is_told_to_end_is_not_done(unserved_world, tmp_path, capsys):
    others = set(multiprocessing.active_children())  # servers that other tests share

    def tell():
        while not list(output.glob("*/tuned/checkpoint-*")):
            time.sleep(0.01)
        [cell] = set(multiprocessing.active_children()) - others
        os.kill(cell.pid, signal.SIGTERM)

    flags = {
        "model_name_or_path": str(unserved_world.student),
        "dataset_name": str(unserved_world.rows),
        "max_steps": 10_000,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "report_to": "none",
    }
    file, output = tmp_path / "study.yaml", tmp_path / "study"
    cells = {"tuned": {"command": "sft", "flags": flags}}
    file.write_text(yaml.safe_dump({"seeds": [0], "cells": cells}))
    words = ["study", str(file), f"--output_dir={output}"]
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    assert main(words) == 1
    assert "/tuned ended with 143" in capsys.readouterr().err
    assert main([*words, "--dry_run"]) == 0
    assert "0 of 1 are done" in capsys.readouterr().out
