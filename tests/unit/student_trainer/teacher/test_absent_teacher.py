"""A server that is not there: told at once, now and then, and given up."""

import itertools
import logging
import time

import pytest
from student_trainer.teacher.sparse import SparseGkdTeacher

from shared.errors import TeacherUnreachableError
from student_trainer.teacher import replicas
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
    assert "Connection refused" in line
    assert "Is the server running? Start it with `teacher-server serve MODEL`" in line


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
