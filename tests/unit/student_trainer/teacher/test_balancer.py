"""Several replicas of one teacher: each fault is caused on a real socket."""

import contextlib
import logging
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import urlsplit

import numpy as np
import pytest

from shared.errors import (
    ConfigurationError,
    InternalError,
    TeacherChangedError,
    TeacherUnauthorizedError,
    TeacherUnreachableError,
)
from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.refusals import _seconds
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support.stub import IDENTITY, StubTeacher, info, packed, problem, score_response

OTHER = IDENTITY.model_copy(update={"fingerprint": "f" * 64})
SEQUENCE = [(np.arange(6, dtype=np.uint32), 2)]


@contextlib.contextmanager
def connected(*stubs, **options):
    with SparseGkdTeacher([s.url for s in stubs], **{"timeout": 10.0, **options}) as client:
        client.connect()
        yield client


@pytest.fixture
def pair():
    """The first of two equally loaded replicas is asked first."""
    with StubTeacher().serving() as first, StubTeacher().serving() as second:
        yield first, second


def score(client):
    (scored,) = client.score(SEQUENCE, ScoreOptions(3))
    return scored


def eventually(condition, message):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


def port_of(stub):
    return urlsplit(stub.url).port


@pytest.mark.parametrize(
    "failure",
    [
        problem(503, "draining"),
        problem(429, "full", **{"Retry-After": "60"}),
        problem(500, "out of memory"),
        problem(504, "too slow"),
        (502, {}, b"bad gateway"),
        (200, {"Content-Length": "1000", "Connection": "close"}, b"cut off"),
    ],
    ids=["503", "429", "500", "504", "gateway", "cut off"],
)
def test_what_fails_at_one_replica_goes_to_another_at_once(pair, failure, caplog):
    first, second = pair
    first.script = [lambda request: failure]
    with caplog.at_level(logging.WARNING), connected(*pair) as client:
        assert len(score(client)) == 4
    assert (len(first.requests), len(second.requests)) == (1, 1)
    assert f"{first.url} is left out" in caplog.text
    assert "next try" not in caplog.text  # no back-off, however long a Retry-After


def test_a_replica_that_is_left_out_is_not_asked_until_it_is_ready(pair, caplog):
    first, second = pair
    with caplog.at_level(logging.WARNING), connected(*pair) as client:
        first.script = [lambda request: problem(503, "draining")]
        first.not_ready = 2
        asked = first.ready_calls
        for _ in range(5):
            score(client)
        assert (len(first.requests), len(second.requests)) == (1, 5)
        eventually(lambda: "is back" in caplog.text, "it does not rejoin")
        assert first.ready_calls - asked == 3  # twice not ready, then ready; and no more
        score(client)
    assert (len(first.requests), len(second.requests)) == (2, 5)


def test_a_replica_is_left_alone_for_as_long_as_it_asks(pair, caplog):
    first, _ = pair
    with caplog.at_level(logging.WARNING), connected(*pair) as client:
        first.script = [lambda request: problem(429, "full", **{"Retry-After": "3"})]
        asked, since = first.ready_calls, time.monotonic()
        score(client)
        eventually(lambda: "is back" in caplog.text, "it does not rejoin")
        assert time.monotonic() - since > 3
        assert first.ready_calls == asked + 1


def test_a_gateways_page_before_a_replica_that_restarts_ends_nothing(pair, caplog):
    first, _ = pair
    with caplog.at_level(logging.WARNING), connected(*pair) as client:
        itself, looks = first.get, []
        first.script = [lambda request: problem(503, "draining")]
        first.get = lambda path: looks.append(path) or (404, {}, b"default backend")
        score(client)
        eventually(lambda: len(looks) > 1, "it is not looked at again")
        score(client)
        first.get = itself
        eventually(lambda: "is back" in caplog.text, "it does not rejoin")
        score(client)


def test_a_silent_teacher_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr("student_trainer.teacher.http._REMIND_SECONDS", 0.2)

    def late(request):
        time.sleep(0.7)
        return packed(score_response(request))

    with (
        StubTeacher().serving() as stub,
        caplog.at_level(logging.WARNING),
        connected(stub) as client,
    ):
        stub.script = [late]
        score(client)
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if f"{stub.url}/v1/score has not answered for" in line]) == 3
    assert "s left" in told[0]


def test_a_killed_replica_is_left_out_and_rejoins_when_restarted_at_its_port(caplog):
    with StubTeacher().serving() as second, contextlib.ExitStack() as life:
        first = life.enter_context(StubTeacher().serving())
        with caplog.at_level(logging.WARNING), connected(first, second) as client:
            score(client)
            life.close()  # killed
            for _ in range(3):
                score(client)
            assert (len(first.requests), len(second.requests)) == (1, 3)
            with StubTeacher().serving(port_of(first)) as again:
                eventually(lambda: f"{first.url} is back" in caplog.text, "it does not rejoin")
                for _ in range(2):  # idle replicas take turns
                    score(client)
                assert len(again.requests) == 1


def test_a_replica_that_hangs_leaves_time_for_the_others(pair):
    first, second = pair
    answer = threading.Event()

    def hang(request):
        answer.wait(20)
        return packed(score_response(request))

    first.script = [hang]
    with connected(*pair, timeout=3.0) as client:
        assert len(score(client)) == 4
        answer.set()
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_when_none_is_left_all_are_tried_until_one_answers(pair, caplog):
    with caplog.at_level(logging.WARNING), connected(*pair, timeout=20.0) as client:
        for stub in pair:
            stub.script = [lambda request: problem(503, "loading")] * 2
            stub.not_ready = 10**6
        assert len(score(client)) == 4
    assert "next try" in caplog.text
    assert sum(len(stub.requests) for stub in pair) >= 4


def test_the_timeout_names_all_replicas(pair):
    for stub in pair:
        stub.script = [lambda request: problem(503, "still loading")] * 100
    with (
        connected(*pair, timeout=1.0) as client,
        pytest.raises(TeacherUnreachableError, match="within 1 s: still loading") as caught,
    ):
        score(client)
    for stub in pair:
        assert stub.url in str(caught.value)


def test_a_request_that_breaks_every_replica_three_times_is_an_error(pair):
    for stub in pair:
        stub.script = [lambda request: problem(500, "out of memory")] * 4
    with connected(*pair) as client, pytest.raises(InternalError, match="out of memory"):
        score(client)
    assert sum(len(stub.requests) for stub in pair) == 4  # once at each, then at one a time


def test_a_replica_that_comes_back_as_another_teacher_stops_the_run(pair):
    first, _ = pair
    with connected(*pair) as client:
        first.script = [lambda request: problem(503, "draining")]
        score(client)
        first.info = info(OTHER)
        with pytest.raises(TeacherChangedError) as caught:
            eventually(lambda: score(client) is None, "nothing stops the run")
    assert len(first.requests) == 1  # it never scored a row
    assert first.url in str(caught.value)
    assert OTHER.fingerprint in str(caught.value)
    assert IDENTITY.fingerprint in str(caught.value)


def test_an_accepted_change_takes_over_only_when_no_replica_of_the_first_teacher_is_left(pair):
    first, second = pair
    with connected(*pair, accept_change=True) as client:
        first.script = [lambda request: problem(503, "draining")]
        score(client)
        first.info = info(OTHER)
        asked = first.ready_calls
        eventually(lambda: first.ready_calls >= asked + 2, "it is not asked whether it is ready")
        score(client)
        assert len(first.requests) == 1
        assert client.info.teacher == IDENTITY
        second.script = [lambda request: problem(503, "draining")] * 100
        second.not_ready = 10**6
        score(client)
        assert client.info.teacher == OTHER
        assert len(first.requests) == 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_in_the_middle_of_a_run_ends_it_at_once(pair, status):
    first, second = pair
    first.script = [lambda request: problem(status, "no such key")]
    with (
        connected(first, second, api_key="k" * 32, timeout=1000.0) as client,
        pytest.raises(TeacherUnauthorizedError, match=f"{first.url} answers {status}") as caught,
    ):
        score(client)
    assert "the key that was sent" in str(caught.value)
    assert "k" * 32 not in str(caught.value)
    assert second.requests == []


def test_a_replica_that_comes_back_with_another_key_ends_the_run(pair):
    first, second = pair
    with connected(first, second, timeout=1000.0) as client:
        first.script = [lambda request: problem(503, "draining")]
        score(client)
        first.get = lambda path: (200, {}, b"") if path == "/ready" else problem(401, "key")
        eventually(
            lambda: client._replicas._balancer._fatal is not None, "the replica was not asked"
        )
        with pytest.raises(TeacherUnauthorizedError, match="TEACHER_API_KEY"):
            score(client)


def test_a_file_of_authorities_that_cannot_be_read_is_named(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/no/ca.pem")
    with pytest.raises(ConfigurationError, match=r"SSL_CERT_FILE /no/ca\.pem: No such file"):
        SparseGkdTeacher(["https://127.0.0.1:1"])


def test_retry_after_is_a_number_of_seconds_or_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 50 < _seconds(later) <= 60
    assert _seconds("2.5") == 2.5
    assert _seconds("soon") is None


def test_the_clients_of_one_process_are_one_to_the_teacher_and_no_others(pair):
    """A server without keys shares itself among clients, which may have one address."""
    names = []
    for _ in range(2):
        with connected(pair[0]) as client:
            names.append(client._replicas.http._client.headers["X-Client-Id"])
    assert names[0] == names[1]
    assert names[0].endswith(f"-{os.getpid()}")
