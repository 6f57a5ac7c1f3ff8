"""Every fault of a call, caused on a socket between the real client and a teacher.

A fault has one of three outcomes: the same answer after another try, the same answer from another
replica, or an error that names the teacher and what was wrong.
"""

import contextlib
import logging
import ssl

import numpy as np
import pytest

from shared.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    PayloadTooLargeError,
    TeacherAnswerError,
    TeacherChangedError,
    TeacherUnauthorizedError,
    TeacherUnreachableError,
)
from shared.protocol import ScoreResponse, ScoreSequence
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support import fault_proxy as fault
from tests.support import stub
from tests.support.certificates import make_authority
from tests.support.fault_proxy import FaultProxy, answered, changed
from tests.support.http import until
from tests.support.paced import PacedTeacher, scores_of

K = 5
RNG = np.random.default_rng(3)
SEQUENCES = [(RNG.integers(0, 100, 12).astype(np.uint32), 4) for _ in range(4)]
RIGHT = [
    scores_of(ScoreSequence(token_ids=ids, completion_start=start), 100, K)
    for ids, start in SEQUENCES
]
PROBLEM = b'{"type":"t","title":"t","status":500,"detail":"out of memory","request_id":"r"}'


@pytest.fixture
def teacher():
    with stub.serving(PacedTeacher(stub.info(), lambda tokens: 0.0)) as url:
        yield url


@pytest.fixture
def proxy(teacher):
    with FaultProxy(teacher).serving() as proxy:
        yield proxy


@contextlib.contextmanager
def connected(*urls, **options):
    with SparseGkdTeacher(urls, **{"timeout": 20.0, **options}) as client:
        client.connect()
        yield client


def assert_right(scores):
    """The very bits that belong to the sequences, in their order."""
    for expected, found in zip(RIGHT, scores, strict=True):
        for name in ("token_ids", "logprobs", "next_token_logprob", "tail_logprob"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


PASSING = {
    "closed without an answer": fault.closed_without_an_answer,
    "reset without an answer": fault.reset_without_an_answer,
    "reset in the middle of the body": fault.reset_in_the_body,
    "cut in the middle of the body": fault.cut_in_the_body,
    "not HTTP": fault.not_http,
    "an endless header": fault.endless_head,
    "500": answered(500, PROBLEM, Content_Type="application/problem+json"),
    "500 of a gateway": answered(500, b"<html>"),
    "502": answered(502, b"bad gateway"),
    "503": answered(503, b"", Retry_After="0"),
    "429": answered(429, b"", Retry_After="0"),
    "an endless problem": answered(503, b"x" * (1 << 20)),
    "a problem nested without end": answered(503, b"[" * 60_000),
    "a Retry-After that is no number": answered(503, b"", Retry_After="soon"),
}
passing = pytest.mark.parametrize("broken", PASSING.values(), ids=PASSING.keys())


@passing
def test_what_passes_is_asked_again_at_the_only_teacher(proxy, broken, caplog):
    with caplog.at_level(logging.WARNING), connected(proxy.url) as client:
        proxy.faults = [broken, broken]
        assert_right(client.score(SEQUENCES, ScoreOptions(K)))
    assert proxy.asked == 3
    assert caplog.text.count(f"Teacher call failed at {proxy.url}") == 2


SLOW = {
    "silence": fault.silent,
    "silence in the middle of the body": fault.silent_in_the_body,
    "a head that drips": fault.dripping_head,
    "a body that drips": fault.dripping_body,
    "504": answered(504, b"too slow"),
}
slow = pytest.mark.parametrize("broken", SLOW.values(), ids=SLOW.keys())
elsewhere = pytest.mark.parametrize(
    "broken", [*PASSING.values(), *SLOW.values()], ids=[*PASSING, *SLOW]
)


@elsewhere
def test_what_fails_at_one_replica_is_answered_by_another(proxy, teacher, broken, caplog):
    with (
        FaultProxy(teacher).serving() as other,
        caplog.at_level(logging.WARNING),
        connected(proxy.url, other.url, timeout=2.0) as client,
    ):
        proxy.faults = [broken]
        assert_right(client.score(SEQUENCES, ScoreOptions(K)))
        assert (proxy.asked, other.asked) == (1, 1)
    assert f"{proxy.url} is left out" in caplog.text


@slow
def test_what_does_not_come_in_time_is_asked_in_halves(proxy, broken, caplog):
    with caplog.at_level(logging.WARNING), connected(proxy.url, timeout=0.7) as client:
        proxy.faults = [broken]
        assert_right(client.score(SEQUENCES, ScoreOptions(K)))
    assert proxy.asked == 3
    assert "A request of 4 is sent in halves" in caplog.text
    assert proxy.url in caplog.text


@slow
def test_what_never_comes_is_an_error_that_names_teacher_and_cause(proxy, broken):
    proxy.always = broken
    with (
        connected(proxy.url, timeout=0.7) as client,
        pytest.raises(DeadlineExceededError, match="sequence 0, of 12 tokens, is too much alone")
        as caught,
    ):  # fmt: skip
        client.score(SEQUENCES[:1], ScoreOptions(K))
    assert proxy.url in str(caught.value)


def test_a_teacher_ten_times_slower_than_the_other_is_waited_for(proxy, teacher, caplog):
    proxy.always = fault.late(0.5)
    with (
        FaultProxy(teacher, always=fault.late(0.05)).serving() as other,
        caplog.at_level(logging.WARNING),
        connected(proxy.url, other.url) as client,
    ):
        calls = [client.submit(client.score, SEQUENCES, ScoreOptions(K)) for _ in range(12)]
        for call in calls:
            assert_right(call.result())
        assert proxy.asked + other.asked == 12
    assert caplog.text == ""


def test_a_500_three_times_ends_the_run(proxy):
    proxy.always = PASSING["500"]
    with (
        connected(proxy.url) as client,
        pytest.raises(
            InternalError, match=rf"out of memory \({proxy.url} answered 500 to request \w+\)"
        ),
    ):
        client.score(SEQUENCES, ScoreOptions(K))
    assert proxy.asked == 3


@pytest.mark.parametrize("broken", ["503", "not HTTP", "reset without an answer"])
def test_what_does_not_pass_is_an_error_after_the_timeout(proxy, broken, caplog):
    proxy.always = PASSING[broken]
    with (
        caplog.at_level(logging.WARNING),
        connected(proxy.url, timeout=1.0) as client,
        pytest.raises(TeacherUnreachableError, match=f"no answer from {proxy.url} within 1 s: "),
    ):
        client.score(SEQUENCES, ScoreOptions(K))
    assert "s left" in caplog.text  # the countdown


def test_nobody_is_waited_for_where_the_run_shall_stop(proxy):
    with connected(proxy.url, timeout=1000.0, unreachable="stop") as client:
        proxy.faults = [fault.reset_in_the_body] * 2  # it is ready: that passes
        assert_right(client.score(SEQUENCES, ScoreOptions(K)))
        proxy.upstream = "http://127.0.0.1:9"
        with pytest.raises(TeacherUnreachableError, match="--teacher_unreachable wait") as caught:
            client.score(SEQUENCES, ScoreOptions(K))
    assert proxy.url in str(caught.value)


def spoilt(field, value):
    """The second row of the second sequence with another value in a field."""

    def change(message):
        array = getattr(message.sequences[1], field).copy()
        array[1] = value
        sequences = list(message.sequences)
        sequences[1] = sequences[1].model_copy(update={field: array})
        return {"sequences": sequences}

    return changed(ScoreResponse, change)


def rearranged(*order):
    return changed(ScoreResponse, lambda m: {"sequences": [m.sequences[i] for i in order]})


def narrow(message):
    cut = [
        s.model_copy(update={"token_ids": s.token_ids[:, :-1], "logprobs": s.logprobs[:, :-1]})
        for s in message.sequences
    ]
    return {"sequences": cut}


def short(message):
    fields = ("token_ids", "logprobs", "next_token_logprob", "tail_logprob")
    rows = {name: getattr(message.sequences[0], name)[:-1] for name in fields}
    return {"sequences": [message.sequences[0].model_copy(update=rows), *message.sequences[1:]]}


OTHER = stub.IDENTITY.model_copy(update={"fingerprint": "f" * 64})
UNUSABLE = {
    "bytes that are no message": (fault.scrambled, "answered something else"),
    "a truncated message": (fault.truncated, "answered something else"),
    "an empty body": (answered(200), "answered something else"),
    "a login page": (answered(200, b"<html>", Content_Type="text/html"), "text/html"),
    "another content type": (fault.of_another_type, "text/html"),
    "a compression bomb": (fault.compressed, "Content-Encoding: gzip"),
    "a body without end": (fault.endless_body, "more than was requested"),
    "too narrow a shape": (changed(ScoreResponse, narrow), r"expected top-k arrays of shape"),
    "a row too few": (changed(ScoreResponse, short), r"expected top-k arrays of shape \(8, 5\)"),
    "a sequence too few": (rearranged(0, 1, 2), "4 sequences were sent"),
    "NaN": (spoilt("logprobs", np.nan), r"logprobs\[1, 0\] = nan"),
    "+inf": (spoilt("next_token_logprob", np.inf), r"next_token_logprob\[1\] = inf"),
    "-inf": (spoilt("logprobs", -np.inf), r"logprobs\[1, 0\] = -inf"),
    "a log-prob above zero": (spoilt("tail_logprob", 0.5), r"tail_logprob\[1\] = 0.5"),
    "a sum above one": (spoilt("tail_logprob", -0.1), "row 1 sum to 1.[0-9]+, which is more"),
    "a token outside the vocabulary": (spoilt("token_ids", 100), "token id 100 is outside"),
    "answers in another order": (rearranged(0, 2, 1, 3), "of another sequence"),
    "an answer twice": (rearranged(0, 0, 2, 3), "of another sequence"),
    "a field that is not known": (
        answered(200, b"\x81\xa1x\x01", Content_Type="application/msgpack"), "something else",
    ),
    "a redirect": (answered(307, Location="http://elsewhere:1/v1/score"), "points to http://else"),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "said"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_what_cannot_be_used_ends_the_run_and_names_teacher_and_cause(proxy, teacher, broken, said):
    """At once, though there is another replica: whatever answers so may have answered before."""
    with (
        FaultProxy(teacher).serving() as other,
        connected(proxy.url, other.url) as client,
    ):
        proxy.faults = [broken]
        with pytest.raises(TeacherAnswerError, match=said) as caught:
            client.score(SEQUENCES, ScoreOptions(K))
    assert proxy.url in str(caught.value)
    assert (proxy.asked, other.asked) == (1, 0)


def test_another_teacher_ends_the_run_and_both_are_shown(proxy):
    proxy.faults = [changed(ScoreResponse, lambda message: {"teacher": OTHER})]
    with connected(proxy.url) as client, pytest.raises(TeacherChangedError) as caught:
        client.score(SEQUENCES, ScoreOptions(K))
    for shown in (proxy.url, OTHER.fingerprint, stub.IDENTITY.fingerprint):
        assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, Exception),
        (401, TeacherUnauthorizedError),
        (403, TeacherUnauthorizedError),
        (404, Exception),
        (422, InvalidRequestError),
    ],
)
def test_a_refusal_ends_the_run_and_names_the_teacher(proxy, status, error):
    proxy.faults = [answered(status, b"no")]
    with (
        connected(proxy.url) as client,
        pytest.raises(error, match=f"{proxy.url} answer(s|ed) {status}"),
    ):
        client.score(SEQUENCES, ScoreOptions(K))
    assert proxy.asked == 1


def test_413_is_asked_in_halves_down_to_one_sequence(proxy):
    proxy.faults = [answered(413, b"too large")] * 2
    with connected(proxy.url) as client:
        assert_right(client.score(SEQUENCES, ScoreOptions(K)))
        assert proxy.asked == 5  # 4, 2, 1, 1, 2
        proxy.always = answered(413, b"too large")
        with pytest.raises(PayloadTooLargeError, match=f"{proxy.url} answered 413"):
            client.score(SEQUENCES, ScoreOptions(K))


def test_a_copy_of_an_answer_is_never_taken_for_the_next_one(proxy):
    """On one connection, where it lies before the next request is asked: httpx gives it out."""
    proxy.always = fault.sent_twice
    with connected(proxy.url) as client:
        (first,) = client.score(SEQUENCES[:1], ScoreOptions(K))
        assert_right([first, *RIGHT[1:]])
        with pytest.raises(TeacherAnswerError, match=f"{proxy.url}.*of another sequence"):
            client.score(SEQUENCES[1:2], ScoreOptions(K))


@pytest.mark.parametrize("date", ["Wed, 21 Oct 2015 07:28:00 GMT", "-5", "nan", "1e999"])
def test_a_strange_retry_after_is_no_reason_to_fail(proxy, date):
    proxy.faults = [answered(503, b"", Retry_After=date)]
    with connected(proxy.url, timeout=1.0) as client:
        assert_right(client.score(SEQUENCES, ScoreOptions(K)))


# Streamed completions.

PROMPTS = [np.array([i], np.uint32) for i in range(3, 9)]


@pytest.fixture
def writer():
    with stub.StubTeacher().serving() as teacher, FaultProxy(teacher.url).serving() as proxy:
        yield proxy


@passing
def test_completions_that_did_not_come_are_asked_for_again(writer, broken):
    with connected(writer.url) as client:
        writer.faults = [broken]
        written = client.generate(PROMPTS, Sampling(4, 0.0, seed=1, stop_token_ids=[1], top_k=K))
    assert [completion.token_ids[0] for completion in written] == list(range(3, 9))
    assert writer.asked == 2


@pytest.mark.parametrize("broken", [fault.scrambled, fault.compressed, fault.of_another_type])
def test_completions_that_cannot_be_used_end_the_run(writer, broken):
    writer.faults = [broken]
    with connected(writer.url) as client, pytest.raises(TeacherAnswerError, match=writer.url):
        client.generate(PROMPTS, Sampling(4, 0.0, seed=1, stop_token_ids=[1]))


# TLS.


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authorities")
    return make_authority(folder / "first"), make_authority(folder / "second")


def showing(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    return context


def port_of(proxy):
    return int(proxy.url.rsplit(":", 1)[1])


def test_a_certificate_that_is_trusted_no_more_ends_the_run_at_once(
    teacher, authorities, monkeypatch
):
    first, second = authorities
    monkeypatch.setenv("SSL_CERT_FILE", str(first.root))
    with FaultProxy(teacher).serving(tls=showing(first)) as proxy:
        client = SparseGkdTeacher([proxy.url], timeout=1000.0)
        client.connect()
        assert_right(client.score(SEQUENCES, ScoreOptions(K)))
    with (
        client,
        FaultProxy(teacher).serving(port_of(proxy), tls=showing(second)),
        pytest.raises(TeacherUnreachableError, match=f"certificate of {proxy.url} is not trusted"),
    ):
        client.score(SEQUENCES, ScoreOptions(K))


def test_a_teacher_that_speaks_no_tls_any_more_is_waited_for(
    teacher, authorities, monkeypatch, caplog
):
    first, _ = authorities
    monkeypatch.setenv("SSL_CERT_FILE", str(first.root))
    with FaultProxy(teacher).serving(tls=showing(first)) as proxy:
        client = SparseGkdTeacher([proxy.url], timeout=20.0)
        client.connect()
    with client, caplog.at_level(logging.WARNING):
        with FaultProxy(teacher).serving(port_of(proxy)):
            call = client.submit(client.score, SEQUENCES, ScoreOptions(K))
            until(lambda: "Teacher call failed" in caplog.text)
        with FaultProxy(teacher).serving(port_of(proxy), tls=showing(first)):
            assert_right(call.result())


# At the start.

AT_THE_START = {
    "a redirect": (answered(301, Location="https://elsewhere:1/"), TeacherAnswerError, "points to"),
    "401": (answered(401), TeacherUnauthorizedError, "answers 401"),
    "404": (answered(404), TeacherAnswerError, "is not found there"),
    "a head that drips": (fault.dripping_head, TeacherUnreachableError, "is not reachable"),
    "503": (answered(503), TeacherUnreachableError, "answers 503 to /ready"),
    "not HTTP": (fault.not_http, TeacherUnreachableError, "is not reachable"),
}


@pytest.mark.parametrize(
    ("broken", "error", "said"), AT_THE_START.values(), ids=AT_THE_START.keys()
)
def test_what_is_no_teacher_is_told_at_the_start(proxy, broken, error, said, monkeypatch):
    monkeypatch.setattr("student_trainer.teacher.http._READY_TIMEOUT", 0.5)
    proxy.ready = broken
    with (
        pytest.raises(error, match=said) as caught,
        connected(proxy.url, timeout=0.5),
    ):
        pass
    assert proxy.url in str(caught.value)
