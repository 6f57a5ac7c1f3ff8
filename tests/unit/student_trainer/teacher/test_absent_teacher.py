"""A server that is not there: told at once, now and then, and given up."""

import itertools
import logging
import math
import re
import time

import httpx
import pytest
from student_trainer.teacher.sparse import SparseGkdTeacher

from shared.errors import TeacherUnreachableError
from student_trainer.config.arguments import ModelArguments, TeacherArguments
from student_trainer.teacher import replicas
from student_trainer.teacher.http import _nothing_listens
from student_trainer.training import teachers
from student_trainer.training.teachers import open_teachers
from tests.support.server import free_port
from tests.support.stub import StubTeacher


def lines(caplog):
    return [record.getMessage() for record in caplog.records if "Waiting" in record.message]


def test_the_remedy_stands_in_the_first_line(caplog):
    url = f"http://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING), SparseGkdTeacher([url], timeout=0.1) as client:
        assert not client.ready()
        with pytest.raises(TeacherUnreachableError, match=r"after 0\.1 s.*--teacher_timeout"):
            client.connect()
    [line] = lines(caplog)
    port = url.rpartition(":")[2]
    assert f"nothing listens at port {port} ([Errno 111] Connection refused)" in line
    assert "0 s left (--teacher_timeout), Ctrl-C ends the wait. Is the server running?" in line
    assert line.endswith("Start it with `teacher-server serve MODEL`")


def test_later_lines_come_more_and_more_rarely(caplog, monkeypatch):
    assert list(itertools.islice(replicas.reminder_seconds(), 6)) == [5, 10, 30, 60, 120, 180]
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(replicas.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(replicas.time, "sleep", lambda seconds: None)
    with caplog.at_level(logging.WARNING), SparseGkdTeacher(["http://a"], timeout=400.0) as client:
        monkeypatch.setattr(client._replicas.http, "why_not_ready", lambda url: "sleeps")
        with pytest.raises(TeacherUnreachableError):
            client.connect()
    assert 6 <= len(lines(caplog)) <= 10


def test_where_nothing_listens_it_gives_up_sooner():
    url = f"http://127.0.0.1:{free_port()}"
    with (
        SparseGkdTeacher([url], timeout=600.0, absent_timeout=0.2) as client,
        pytest.raises(TeacherUnreachableError, match=r"after 0\.2 s.*raise --absent_timeout"),
    ):
        client.connect()


def test_where_nothing_listens_on_this_machine_a_run_gives_up_sooner(caplog, monkeypatch):
    monkeypatch.setattr(teachers, "_LOCAL_SECONDS", 0.2)
    url = f"http://localhost:{free_port()}"
    with (
        caplog.at_level(logging.WARNING),
        open_teachers(TeacherArguments([url]), ModelArguments("m")) as opened,
    ):
        assert not opened.ready()
        with pytest.raises(TeacherUnreachableError, match=r"after 0\.2 s.*to wait longer"):
            opened.connect()
    [line] = lines(caplog)
    assert "0 s left (give --teacher_timeout, other than 600, to wait longer), Ctrl-C" in line
    assert "ends the wait" in line


@pytest.mark.parametrize(
    ("host", "timeout", "seconds"),
    [
        ("localhost:9", 600.0, 30.0),
        ("127.0.0.2:9", 600.0, 30.0),
        ("[::1]:9", 600.0, 30.0),
        ("localhost:9", 3600.0, math.inf),  # it was asked for
        ("gpu-box:9", 600.0, math.inf),
    ],
)
def test_how_long_nothing_may_listen(host, timeout, seconds):
    flags = TeacherArguments([f"http://{host}"], teacher_timeout=timeout)
    with open_teachers(flags, ModelArguments("m")) as opened:
        replicas_of = opened.of(None)._replicas
        assert replicas_of._absence_allowed(f"http://{host}") == seconds
        assert replicas_of._retries.absent_timeout == math.inf  # a server may be restarted


def test_later_lines_count_down_to_the_same_moment_as_the_first(caplog, monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(replicas.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(replicas.time, "sleep", lambda seconds: None)
    with (
        caplog.at_level(logging.WARNING),
        SparseGkdTeacher(["http://a"], timeout=400.0, absent_timeout=30.0) as client,
    ):
        http = client._replicas.http
        monkeypatch.setattr(http, "why_not_ready", lambda url: "cannot: nothing listens")
        monkeypatch.setattr(http, "listens", lambda url: False)
        with pytest.raises(TeacherUnreachableError, match="after 30 s"):
            client.connect()
    left = [float(re.search(r"(\d+) s left", line)[1]) for line in lines(caplog)]
    assert left[0] == 30
    assert left == sorted(left, reverse=True)
    assert len(left) > 1


def test_what_answers_need_not_be_started():
    with StubTeacher().serving() as stub, SparseGkdTeacher([stub.url], timeout=0.2) as client:
        stub.not_ready = 1000
        with pytest.raises(TeacherUnreachableError, match="Check --teacher_url, or raise") as error:
            client.connect()
    assert "Start it" not in str(error.value)


def test_an_address_without_a_port_is_told():
    error = httpx.ConnectError("[Errno 111] Connection refused")
    assert "at port 80, and the address names no other" in _nothing_listens("http://a", error)
    assert "port 443" in _nothing_listens("https://a", error)
    assert not _nothing_listens("http://a:1", httpx.ConnectError("Name or service not known"))


def test_a_server_that_loads_is_waited_for_longer():
    with (
        StubTeacher().serving() as stub,
        SparseGkdTeacher([stub.url], timeout=5.0, absent_timeout=0.1) as client,
    ):
        stub.not_ready = 3
        since = time.monotonic()
        client.connect()
        assert time.monotonic() - since > 0.1


def test_a_server_that_ends_is_given_up_sooner_too():
    with StubTeacher().serving() as stub:
        client = SparseGkdTeacher([stub.url], timeout=600.0, absent_timeout=0.2)
        client.connect()
    with (
        client,
        pytest.raises(TeacherUnreachableError, match=r"within 0\.2 s.*raise --absent_timeout"),
    ):
        client.score([([1, 2, 3], 1)], top_k=2)
