"""A teacher in a process of its own that is killed, stopped, restarted or replaced."""

import contextlib
import logging
import signal

import numpy as np
import pytest

from shared.errors import TeacherChangedError, TeacherUnreachableError
from shared.protocol import ScoreSequence
from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support import stub, stub_process
from tests.support.http import until
from tests.support.paced import scores_of
from tests.support.server import free_port

IDS, START = np.arange(40, 60, dtype=np.uint32), 7
EXPECTED = scores_of(ScoreSequence(token_ids=IDS, completion_start=START), 100, 4)
OTHER = stub.info(stub.IDENTITY.model_copy(update={"model": "other", "fingerprint": "f" * 64}))


@pytest.fixture
def running(tmp_path):
    """Starts processes, each answering a request after a quarter of a second."""
    with contextlib.ExitStack() as life:

        def start(port, info=None):
            info = stub.info() if info is None else info
            return life.enter_context(stub_process.running(port, info, tmp_path, 0.25))

        yield start


def client_of(*ports, **options):
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    client = SparseGkdTeacher(urls, **{"timeout": 30.0, **options})
    client.connect()
    return client


def asked(client):
    """A call under way: it is with a teacher when the fault comes, a quarter of a second long."""
    call = client.submit(client.score, [(IDS, START)], ScoreOptions(4))
    until(lambda: any(client._replicas._balancer._outstanding.values()))
    return call


def assert_right(scores):
    for name in ("token_ids", "logprobs", "next_token_logprob", "tail_logprob"):
        np.testing.assert_array_equal(getattr(scores[0], name), getattr(EXPECTED, name))


def test_a_killed_teacher_is_waited_for_with_a_countdown_until_it_is_restarted(running, caplog):
    port = free_port()
    process = running(port)
    with caplog.at_level(logging.WARNING), client_of(port) as client:
        call = asked(client)
        process.kill()
        until(lambda: "Teacher call failed" in caplog.text)
        running(port)
        assert_right(call.result(30))
    assert "s left" in caplog.text


def test_a_killed_replica_costs_only_another_try(running):
    first, second = free_port(), free_port()
    process = running(first)
    running(second)
    with client_of(first, second) as client:
        call = asked(client)
        process.kill()
        assert_right(call.result(30))


def test_all_replicas_killed_are_waited_for_until_one_is_back(running, caplog):
    ports = free_port(), free_port()
    processes = [running(port) for port in ports]
    with caplog.at_level(logging.WARNING), client_of(*ports) as client:
        call = asked(client)
        for process in processes:
            process.kill()
        until(lambda: "Teacher call failed" in caplog.text)
        running(ports[1])
        assert_right(call.result(30))


def test_a_stopped_teacher_answers_when_it_goes_on(running):
    port = free_port()
    process = running(port)
    with client_of(port) as client:
        call = asked(client)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            call.result(1.0)
        process.send_signal(signal.SIGCONT)
        assert_right(call.result(30))


def test_a_stopped_replica_is_left_out_and_rejoins_when_it_goes_on(running, caplog, monkeypatch):
    monkeypatch.setattr("student_trainer.teacher.http._READY_TIMEOUT", 0.3)
    first, second = free_port(), free_port()
    process = running(first)
    running(second)
    with caplog.at_level(logging.WARNING), client_of(first, second, timeout=2.0) as client:
        process.send_signal(signal.SIGSTOP)
        assert_right(client.score([(IDS, START)], ScoreOptions(4)))
        assert f"127.0.0.1:{first} is left out" in caplog.text
        process.send_signal(signal.SIGCONT)
        until(lambda: f"127.0.0.1:{first} is back" in caplog.text)


def test_a_teacher_stopped_for_good_is_named_after_the_timeout(running, monkeypatch):
    monkeypatch.setattr("student_trainer.teacher.http._READY_TIMEOUT", 0.3)
    port = free_port()
    process = running(port)
    with client_of(port, timeout=1.0) as client:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TeacherUnreachableError, match=f"127.0.0.1:{port} within 1 s"):
            client.score([(IDS, START)], ScoreOptions(4))


def test_another_model_at_the_same_address_ends_the_run_and_both_are_shown(running):
    port = free_port()
    process = running(port)
    with client_of(port) as client:
        call = asked(client)
        process.kill()
        running(port, OTHER)
        with pytest.raises(TeacherChangedError) as caught:
            call.result(30)
    for shown in (f"127.0.0.1:{port}", str(stub.IDENTITY), str(OTHER.teacher)):
        assert shown in str(caught.value)
