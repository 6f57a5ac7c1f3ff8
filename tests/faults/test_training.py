"""Whole runs while the teacher fails: the same weights to the last bit, or a checkpoint and why."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from shared import wire
from shared.protocol import ScoreResponse
from student_trainer.commands.main import main
from tests.e2e.test_overlap import assert_same_to_the_last_bit, words
from tests.support import fault_proxy as fault
from tests.support import stub, stub_process
from tests.support.fault_proxy import FaultProxy, answered
from tests.support.http import until
from tests.support.paced import PacedTeacher
from tests.support.server import free_port

NOWHERE = "http://127.0.0.1:9"
METHODS = {
    "off-policy": {"lmbda": 0, "teacher_prefetch_steps": 2},
    "on-policy": {"lmbda": 1},
    "stale": {"lmbda": 0.5, "rollout_staleness": 1, "beta": 1},
}


@pytest.fixture(scope="module")
def world(unserved_world, tmp_path_factory):
    """A student with dropout: what was drawn in the step that failed must be drawn again."""
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(unserved_world.folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "student" / "config.json").read_text())
    config["attention_dropout"] = 0.1
    (folder / "student" / "config.json").write_text(json.dumps(config))
    return replace(unserved_world, folder=folder)


@pytest.fixture(scope="module")
def teacher(teacher_info):
    with stub.serving(PacedTeacher(teacher_info, lambda tokens: 0.0, one_at_a_time=False)) as url:
        yield url


@pytest.fixture(scope="module")
def whole(world, teacher, tmp_path_factory):
    """Folders of runs that nothing disturbed, by method."""
    folder = tmp_path_factory.mktemp("whole")
    for name, method in METHODS.items():
        assert main(words(world, teacher, folder / name, **method)) == 0
    return folder


@pytest.fixture
def proxy(teacher):
    with FaultProxy(teacher).serving() as proxy:
        yield proxy


def resumed(world, url, output, **options):
    return main(words(world, url, output, resume_from_checkpoint="auto", **options))


def checkpoints(output):
    return sorted(folder.name for folder in output.glob("checkpoint-*"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_through_every_passing_fault_learns_the_same(world, whole, proxy, tmp_path, method):
    faults = [
        fault.reset_in_the_body, fault.cut_in_the_body, fault.closed_without_an_answer,
        fault.late(0.2), fault.not_http, answered(503, Retry_After="0"), answered(500, b"oom"),
    ]  # fmt: skip
    proxy.faults = [one for each in faults for one in (each, fault.passed_on)]
    assert main(words(world, proxy.url, tmp_path, **METHODS[method])) == 0
    assert proxy.faults == []
    assert_same_to_the_last_bit(whole / method, tmp_path)


def test_a_teacher_killed_and_restarted_in_the_middle_of_a_run_changes_nothing(
    world, whole, teacher_info, tmp_path, caplog
):
    port = free_port()
    processes = [stub_process.start(port, teacher_info, tmp_path)]

    def kill_and_restart(exchange):
        """The answer is lost with the process; the next one takes a while to be ready."""
        processes[-1].kill()
        processes[-1].wait()
        processes.append(stub_process.start(port, teacher_info, tmp_path))
        fault.closed_without_an_answer(exchange)

    try:
        until(lambda: stub_process.answers(port))
        with FaultProxy(f"http://127.0.0.1:{port}").serving() as proxy:
            proxy.faults = [fault.passed_on] * 6 + [kill_and_restart]
            assert main(words(world, proxy.url, tmp_path / "out", **METHODS["stale"])) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len(processes) == 2
    assert "Teacher call failed" in caplog.text
    assert_same_to_the_last_bit(whole / "stale", tmp_path / "out")


def gone_for_good(proxy):
    def fault_of(exchange):
        proxy.upstream = NOWHERE
        fault.closed_without_an_answer(exchange)

    return fault_of


@pytest.mark.parametrize(
    ("method", "policy"), [("off-policy", "stop"), ("on-policy", "wait"), ("stale", "stop")]
)
def test_a_run_that_loses_its_teacher_saves_and_goes_on_to_the_same_weights(
    world, whole, teacher, proxy, tmp_path, method, policy, caplog, capsys
):
    """Whatever of a step was done: its batch, its gradients and what dropout drew are undone."""
    timeout = 1.0 if policy == "wait" else 1000.0
    options = {**METHODS[method], "teacher_unreachable": policy, "teacher_timeout": timeout}
    proxy.faults = [fault.passed_on] * 14 + [gone_for_good(proxy)]
    assert main(words(world, proxy.url, tmp_path, **options)) == 1
    said = capsys.readouterr().err
    assert f"no answer from {proxy.url}" in said
    assert "--teacher_unreachable wait" in said if policy == "stop" else "within 1 s" in said
    assert ("s left" in caplog.text) == (policy == "wait")  # the countdown
    (saved,) = checkpoints(tmp_path)
    assert f"Saved {tmp_path / saved}" in caplog.text
    assert resumed(world, teacher, tmp_path, **METHODS[method]) == 0
    assert_same_to_the_last_bit(whole / method, tmp_path)


def test_another_teacher_at_the_same_address_ends_a_run_that_goes_on_with_the_first(
    world, whole, teacher_info, teacher, proxy, tmp_path, capsys
):
    other = teacher_info.teacher.model_copy(update={"model": "other", "fingerprint": "f" * 64})
    replaced = PacedTeacher(teacher_info.model_copy(update={"teacher": other}), lambda tokens: 0.0)
    with stub.serving(replaced) as url:

        def replace_teacher(exchange):
            proxy.upstream = url
            fault.closed_without_an_answer(exchange)

        proxy.faults = [fault.passed_on] * 14 + [replace_teacher]
        assert main(words(world, proxy.url, tmp_path, **METHODS["stale"])) == 1
    said = capsys.readouterr().err
    for shown in (proxy.url, str(other), str(teacher_info.teacher)):
        assert shown in said
    assert len(checkpoints(tmp_path)) == 1
    assert resumed(world, teacher, tmp_path, **METHODS["stale"]) == 0
    assert_same_to_the_last_bit(whole / "stale", tmp_path)


def test_an_answer_that_cannot_be_used_ends_a_run_with_a_checkpoint_and_no_step_left_out(
    world, whole, teacher, proxy, tmp_path, capsys
):
    proxy.faults = [fault.passed_on] * 14 + [fault.compressed]
    assert main(words(world, proxy.url, tmp_path, **METHODS["on-policy"])) == 1
    message = capsys.readouterr().err
    assert f"{proxy.url}/v1/score answered" in message
    assert "Content-Encoding: gzip" in message
    assert len(checkpoints(tmp_path)) == 1
    assert resumed(world, teacher, tmp_path, **METHODS["on-policy"]) == 0
    assert_same_to_the_last_bit(whole / "on-policy", tmp_path)


def test_a_teacher_lost_while_held_out_rows_are_scored_leaves_a_checkpoint(
    world, whole, teacher, proxy, tmp_path, capsys
):
    """All of them in one request, after the fourth step; a step asks for a few at a time."""
    measured = {
        **METHODS["on-policy"], "eval_dataset_name": world.held_out, "eval_strategy": "steps",
        "eval_steps": 4,
    }  # fmt: skip

    def refuse_many(exchange):
        answer = wire.load(ScoreResponse, exchange.body, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 28)
        few = len(answer.sequences) < 16
        (fault.passed_on if few else answered(422, b"no"))(exchange)

    proxy.always = refuse_many
    assert main(words(world, proxy.url, tmp_path, **measured)) == 1
    assert f"{proxy.url} answered 422" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert resumed(world, teacher, tmp_path, **METHODS["on-policy"]) == 0
    assert_same_to_the_last_bit(whole / "on-policy", tmp_path)


# Two processes.


def launch(flags):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, "-m", "student_trainer", *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow_fault
def test_when_one_of_two_ranks_loses_its_teacher_both_save_and_go_on_to_the_same_weights(
    world, teacher, proxy, tmp_path
):
    options = {**METHODS["stale"], "gradient_accumulation_steps": 2}
    done = launch(words(world, teacher, tmp_path / "whole", **options))
    assert done.returncode == 0, done.stdout + done.stderr
    proxy.faults = [fault.passed_on] * 14 + [answered(422, b"no")]
    done = launch(words(world, proxy.url, tmp_path / "parts", **options))
    assert done.returncode != 0
    assert f"{proxy.url} answered 422" in done.stderr
    assert "another process of this run lost its teacher" in done.stderr
    (saved,) = (tmp_path / "parts").glob("checkpoint-*")
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {file.name for file in saved.iterdir()}
    options["resume_from_checkpoint"] = "auto"
    done = launch(words(world, teacher, tmp_path / "parts", **options))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_to_the_last_bit(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow_fault
def test_ranks_that_reach_different_teachers_do_not_begin(world, teacher_info, tmp_path):
    class Twofold(PacedTeacher):
        """A balancer before two models."""

        def get(self, path):
            number = next(numbers) if path == "/v1/info" else 0
            identity = teacher_info.teacher.model_copy(update={"fingerprint": str(number) * 64})
            return stub.packed(teacher_info.model_copy(update={"teacher": identity}))

    numbers = itertools.count(1)
    with stub.serving(Twofold(teacher_info, lambda tokens: 0.0)) as url:
        done = launch(words(world, url, tmp_path, **METHODS["on-policy"]))
    assert done.returncode != 0
    assert "the processes of this run reached different teachers" in done.stderr
    assert "1" * 64 in done.stderr
    assert "2" * 64 in done.stderr
    assert checkpoints(tmp_path) == []
