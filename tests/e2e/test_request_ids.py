"""One id leads from a trainer's warning to what the teacher logged of the same request."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.fault_proxy import FaultProxy, answered, cut_in_the_body
from tests.support.server import free_port, start_server, wait_until_ready

STEPS = 2


@pytest.fixture(scope="module")
def run(unserved_world, tmp_path_factory):
    """Lines of (trainer, teacher): two processes, and two failed attempts between them."""
    folder = tmp_path_factory.mktemp("logs")
    port, log = free_port(), folder / "teacher.log"
    flags = ["--log-format", "json", "--log-requests"]
    # Libraries read whether they may draw progress bars when they are imported.
    teacher = start_server(unserved_world.teacher, *flags, port=port, log=log, command_line=True)
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        wait_until_ready(teacher, url, log)
        busy = answered(503, b"{}", Content_Type="application/json", Retry_After="0")
        proxy = FaultProxy(url, faults=[busy, cut_in_the_body])
        with proxy.serving():
            flags = {
                "model_name_or_path": unserved_world.student, "dataset_name": unserved_world.rows,
                "output_dir": folder / "out", "teacher_url": proxy.url, "lmbda": 0,
                "per_device_train_batch_size": 8, "max_steps": STEPS, "logging_steps": 1,
                "save_strategy": "no", "report_to": "none", "log_format": "json",
            }  # fmt: skip
            trainer = subprocess.run(
                [sys.executable, "-m", "student_trainer", "distill",
                 *(f"--{name}={value}" for name, value in flags.items())],
                env=environment, capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
        assert trainer.returncode == 0, trainer.stderr
    finally:
        teacher.terminate()
        teacher.wait(30)
    return [
        [parsed(line) for line in text.splitlines()] for text in (trainer.stderr, log.read_text())
    ]


def parsed(line):
    try:
        return json.loads(line)
    except ValueError:
        pytest.fail(f"no JSON: {line!r}")


def test_every_line_says_when_how_badly_who_and_what(run):
    for side in run:
        assert side
        for line in side:
            assert list(line)[:4] == ["time", "level", "logger", "message"]


def test_attempts_carry_one_id_that_the_teacher_logs_too(run):
    trainer, teacher = run
    failed = [line for line in trainer if line["message"].startswith("Teacher call failed")]
    [asked] = {line["request_id"] for line in failed}
    assert [(line["attempt"], line["level"]) for line in failed] == [(1, "warning"), (2, "warning")]
    assert f"answered 503 to request {asked}" in failed[0]["message"]
    answered = [line for line in teacher if line.get("request_id") == asked]
    assert [(line["route"], line["status"]) for line in answered] == [("/v1/score", 200)] * 3


def test_each_request_has_an_id_of_its_own(run):
    scored = [line["request_id"] for line in run[1] if line.get("route") == "/v1/score"]
    # Asked twice before training, of which one was answered at the third attempt; then each step.
    assert len(scored) == 2 + 2 + STEPS
    assert len(set(scored)) == 2 + STEPS


def test_the_windows_of_a_run_are_lines(run):
    windows = [line for line in run[0] if "metrics" in line]
    assert [line["step"] for line in windows] == [*range(1, STEPS + 1), STEPS]
    assert all(line["metrics"]["train/divergence"] > 0 for line in windows[:STEPS])
