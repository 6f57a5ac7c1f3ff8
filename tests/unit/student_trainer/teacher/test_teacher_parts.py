"""The parts of a teacher's client, each alone and without a socket."""

import inspect
import threading
from types import SimpleNamespace

import httpx
import pytest

from shared.errors import (
    InternalError,
    InvalidRequestError,
    OverloadedError,
    TeacherChangedError,
    TeacherUnreachableError,
    UnavailableError,
)
from student_trainer.teacher import balancer, retry
from student_trainer.teacher.balancer import Balancer
from student_trainer.teacher.base import Teacher
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.refusals import refusal
from student_trainer.teacher.retry import RetryPolicy
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from student_trainer.teacher.traffic import Traffic
from student_trainer.teacher.vllm import VllmTeacher

URLS = ["http://a", "http://b", "http://c"]
MEMBERS = [name for name in vars(Teacher) if not name.startswith("_")]


@pytest.mark.parametrize("teacher", [SparseGkdTeacher, VllmTeacher, CachedTeacher])
def test_each_teacher_has_the_interface_and_inherits_nothing(teacher):
    assert teacher.__bases__ == (object,)
    for name in (*MEMBERS, "__enter__", "__exit__"):
        declared, own = getattr(Teacher, name), getattr(teacher, name)
        assert isinstance(own, property) == isinstance(declared, property), name
        if not isinstance(declared, property):
            assert own.__doc__ or name.startswith("_"), name
            assert list(inspect.signature(own).parameters) == list(
                inspect.signature(declared).parameters
            )


def test_the_interface_has_no_state():
    assert not Teacher.__annotations__


def policy(**changes):
    options = {
        "urls": URLS,
        "timeout": 60.0,
        "start": "serve",
        "unreachable": "wait",
        "nobody_ready": lambda: pytest.fail("asked whether a replica is ready"),
    }
    return RetryPolicy(**{**options, **changes})


def failing(*errors):
    """An attempt that raises each of the errors in turn, and then answers."""
    left = list(errors)

    def attempt():
        if left:
            raise left.pop(0)
        return "answer"

    return attempt, left


@pytest.fixture
def no_back_off(monkeypatch):
    monkeypatch.setattr(retry, "_backoff", lambda state: 0.0)


@pytest.mark.usefixtures("no_back_off")
@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full"),
        UnavailableError("loading"),
        httpx.ReadError("cut"),
        InternalError("x"),
    ],
    ids=["429", "503", "cut", "500"],
)
def test_errors_that_pass_are_repeated(error):
    attempt, left = failing(error, error)
    assert policy().run(attempt, "id") == "answer"
    assert left == []


@pytest.mark.usefixtures("no_back_off")
@pytest.mark.parametrize(
    ("error", "attempts"),
    [(InternalError("out of memory"), 3), (InvalidRequestError("top_k"), 1)],
    ids=["500", "422"],
)
def test_errors_that_stay_are_raised_as_they_are(error, attempts):
    attempt, left = failing(*[error] * 9)
    with pytest.raises(type(error)):
        policy().run(attempt, "id")
    assert 9 - len(left) == attempts


@pytest.mark.usefixtures("no_back_off")
def test_nothing_is_waited_for_when_told_to_stop_and_nobody_is_ready():
    ready = [False, True]  # some replica is ready after the first failure, none after the second
    attempt, left = failing(*[UnavailableError("loading")] * 9)
    stopping = policy(unreachable="stop", nobody_ready=lambda: ready.pop(0))
    with pytest.raises(TeacherUnreachableError) as caught:
        stopping.run(attempt, "id7")
    assert str(caught.value) == (
        "no answer from http://a, http://b, http://c: loading. Check that `serve` runs there, and "
        "its log of request id7, or give --teacher_unreachable wait"
    )
    assert len(left) == 7


def test_a_pause_is_a_retry_after_within_what_is_left(monkeypatch):
    monkeypatch.setattr(retry, "_backoff", lambda state: 0.5)

    def pause(error, since):
        outcome = SimpleNamespace(exception=lambda: error)
        return policy()._pause(SimpleNamespace(outcome=outcome, seconds_since_start=since))

    assert pause(OverloadedError("full", retry_after=7.0), 10.0) == 7.0
    assert pause(OverloadedError("full", retry_after=7.0), 58.0) == 2.0
    assert pause(OverloadedError("full", retry_after=0.1), 10.0) == 0.5
    assert pause(httpx.ReadError("cut"), 61.0) == 0.0


def balanced(**changes):
    options = {"may_rejoin": lambda url: False, "longest_pause": 1.0}
    return Balancer(URLS, **{**options, **changes})


def test_idle_replicas_take_turns_and_a_busy_one_is_passed_over():
    among = balanced()
    assert [among.call(lambda url: url, lambda: 1) for _ in range(4)] == [*URLS, URLS[0]]

    def during(url):
        return url, [among.call(lambda other: other, lambda: 1) for _ in range(4)]

    busy, meanwhile = among.call(during, lambda: 100)
    assert busy not in meanwhile
    among.close()
    with pytest.raises(TeacherUnreachableError, match="the client is closed"):
        among.call(lambda url: url, lambda: 1)


def test_every_replica_is_tried_once_and_the_last_error_is_raised():
    tried = []

    def fail(url):
        tried.append(url)
        raise UnavailableError(url)

    among = balanced()
    with pytest.raises(UnavailableError) as caught:
        among.call(fail, lambda: 1)
    assert sorted(tried) == URLS
    assert caught.value.detail == tried[-1]
    assert not any(among._outstanding.values())
    among.close()


def test_a_replica_that_is_another_teacher_ends_the_run(monkeypatch):
    monkeypatch.setattr(balancer, "_RECHECK_SECONDS", 0.01)

    over = threading.Event()

    def may_rejoin(url):
        over.wait(10)
        raise TeacherChangedError(f"{url} is another")

    def fail_at_first(url):
        if url == "http://first":
            raise UnavailableError("draining")
        return url

    among = Balancer(["http://first", "http://second"], may_rejoin=may_rejoin, longest_pause=1.0)
    assert among.call(fail_at_first, lambda: 1) == "http://second"
    [watch] = [t for t in threading.enumerate() if t.name == "teacher-back-http://first"]
    over.set()
    watch.join(10)
    with pytest.raises(TeacherChangedError, match="http://first is another"):
        among.call(fail_at_first, lambda: 1)


@pytest.mark.parametrize(
    ("status", "content", "error", "text"),
    [
        (502, b"<html>", UnavailableError, "http://a answered 502"),
        (429, b'{"detail": "full"}', OverloadedError, r"full \(http://a answered 429\)"),
        (422, b'{"error": {"message": "no", "param": "n"}}', InvalidRequestError, r"no \(http"),
        (500, b'["a list"]', UnavailableError, "http://a answered 500"),
    ],
)
def test_a_refusal_is_the_error_of_its_status(status, content, error, text):
    response = httpx.Response(status, headers={"Retry-After": "3"})
    with pytest.raises(error, match=text) as caught:
        raise refusal("http://a", response, content)
    assert caught.value.retry_after == 3.0


def test_traffic_is_counted_from_one_take_to_the_next():
    traffic = Traffic()
    traffic.count_bytes(3)
    traffic.count_bytes(4)
    traffic.count_scored(5)
    assert traffic.take() == (7, 5)
    assert traffic.take() == (0, 0)
