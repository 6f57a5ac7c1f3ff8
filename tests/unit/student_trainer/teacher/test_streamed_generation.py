"""Completions as they arrive, over a socket that sends, cuts and spoils them as each test says."""

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import InvalidRequestError, TeacherAnswerError, TeacherChangedError
from shared.protocol import Problem
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support.stub import (
    IDENTITY,
    BrokenError,
    StubTeacher,
    end,
    event,
    info,
    packed,
    problem,
    score_response,
    streamed,
)

PROMPTS = [
    np.full(count, first, np.uint32) for count, first in ((2, 10), (5, 11), (3, 12), (1, 13))
]
SAMPLING = Sampling(max_new_tokens=8, temperature=0.5, seed=5, stop_token_ids=[1, 9])
SCORED = replace(SAMPLING, top_k=4)


@pytest.fixture
def stub():
    with StubTeacher().serving() as stub:
        yield stub


@pytest.fixture
def client(stub):
    with SparseGkdTeacher([stub.url], timeout=10.0) as client:
        client.connect()
        yield client


def firsts(completions):
    return [int(completion.token_ids[0]) for completion in completions]


def await_rows(client, count):
    """Returns when the client has taken scores of so many rows more."""
    deadline = time.monotonic() + 10
    while count > 0:
        assert time.monotonic() < deadline, "completions are held back"
        count -= client.take_traffic()[1]
        time.sleep(0.01)


def broken_after(*prompts):
    """An answer that brings these and breaks."""

    def pieces(request):
        yield from (event(request, prompt) for prompt in prompts)
        raise BrokenError

    return lambda request: streamed(pieces(request))


def refused_after(*prompts, status):
    refusal = Problem(type="x", title="t", status=status, detail="no more", request_id="r")

    def answer(request):
        return streamed([*(event(request, p) for p in prompts), end(problem=refusal)])

    return answer


def test_each_completion_is_taken_before_the_next_is_written(stub, client):
    taken = []

    def pieces(request):
        for prompt in (2, 0, 3, 1):
            yield event(request, prompt)
            await_rows(client, 2)
            taken.append(prompt)
        yield end()

    stub.script = [lambda request: streamed(pieces(request))]
    completions = client.generate(PROMPTS, SCORED)
    assert taken == [2, 0, 3, 1]
    assert firsts(completions) == [10, 11, 12, 13]


def test_scores_are_counted_and_checked_as_they_arrive(client):
    client.take_traffic()
    completions = client.submit(client.generate, PROMPTS, SCORED).result()
    received, scored = client.take_traffic()
    assert [completion.scores.token_ids.shape for completion in completions] == [(2, 4)] * 4
    assert scored == 8
    assert received > 8 * 4 * 8


@pytest.mark.parametrize(
    "broken",
    [broken_after(3, 1), refused_after(3, 1, status=503), refused_after(3, 1, status=504)],
    ids=["cut", "draining", "deadline"],
)
def test_only_what_did_not_come_is_asked_for_again(stub, client, broken, caplog):
    stub.script = [broken, broken_after(1)]
    with caplog.at_level(logging.WARNING):
        completions = client.generate(PROMPTS, SCORED)
    assert firsts(completions) == [10, 11, 12, 13]
    assert [[int(ids[0]) for ids in request.prompts] for request in stub.requests] == [
        [10, 11, 12, 13],
        [10, 12],
        [10],
    ]
    assert {request.seed for request in stub.requests} == {5}
    assert client.take_traffic()[1] == 8  # each of the four once
    assert "2 of its 4 completions are requested again" in caplog.text


def test_an_answer_that_breaks_before_its_first_completion_is_tried_again(stub, client, caplog):
    stub.script = [broken_after()]
    with caplog.at_level(logging.WARNING):
        assert firsts(client.generate(PROMPTS, SAMPLING)) == [10, 11, 12, 13]
    assert [len(request.prompts) for request in stub.requests] == [4, 4]
    assert "Teacher call failed" in caplog.text


def test_halves_do_not_ask_again_for_what_came(stub, client):
    """One completion comes; then the rest is too much, and so is all but one prompt at a time."""

    def answer(request):
        if len(request.prompts) > 1:
            return problem(504, "too slow")
        return streamed([event(request, 0), end()])

    stub.script = [refused_after(2, status=504)] + [answer] * 10
    assert firsts(client.generate(PROMPTS, SCORED)) == [10, 11, 12, 13]
    assert client.take_traffic()[1] == 8  # each of the four once
    assert [len(request.prompts) for request in stub.requests] == [4, 3, 2, 1, 1, 1]


def test_a_stream_that_stalls_is_asked_for_the_rest(stub, caplog):
    over = threading.Event()

    def pieces(request):
        yield from (event(request, prompt) for prompt in (2, 0))
        over.wait(20)

    stub.script = [lambda request: streamed(pieces(request))]
    with (
        caplog.at_level(logging.WARNING),
        SparseGkdTeacher([stub.url], timeout=1.0) as client,
    ):
        client.connect()
        assert firsts(client.generate(PROMPTS, SAMPLING)) == [10, 11, 12, 13]
        over.set()
    assert [[int(ids[0]) for ids in request.prompts] for request in stub.requests][1:] == [[11, 13]]
    assert "is ready, but has not answered in 1 s" in caplog.text
    assert "; 2 of its 4 completions are requested again" in caplog.text


def test_a_refusal_at_the_end_is_raised(stub, client):
    stub.script = [refused_after(0, 1, status=422)]
    with pytest.raises(InvalidRequestError, match="no more"):
        client.generate(PROMPTS, SAMPLING)
    assert len(stub.requests) == 1


OTHER = IDENTITY.model_copy(update={"fingerprint": "f" * 64})


def test_no_completion_of_another_teacher_is_taken_even_from_an_answer_that_breaks(stub, client):
    """The rest of a broken answer comes from a server that was restarted with other weights."""

    def others(request):
        yield event(request, 0, OTHER)
        raise BrokenError

    stub.script = [broken_after(3, 1), lambda request: streamed(others(request))]
    with pytest.raises(TeacherChangedError):
        client.generate(PROMPTS, SCORED)
    assert client.take_traffic()[1] == 4  # of the two before
    assert len(stub.requests) == 2


def test_another_teacher_is_accepted_within_an_answer_when_told_so(stub, caplog):
    stub.script = [broken_after(3, 1)]
    with SparseGkdTeacher([stub.url], timeout=10.0, accept_change=True) as client:
        client.connect()
        stub.info = info(OTHER)
        with caplog.at_level(logging.WARNING):
            assert firsts(client.generate(PROMPTS, SAMPLING)) == [10, 11, 12, 13]
        assert client.info.teacher == OTHER
    assert caplog.text.count("is another teacher now") == 1


def spoilt(**changes):
    """The first completion, with fields of its own or of the event changed."""

    def pieces(request):
        first = event(request, 0)
        update = {name: changes[name] for name in ("token_ids", "scores") if name in changes}
        done = first.completion.model_copy(update=update)
        rest = {name: changes[name] for name in ("prompt", "sample") if name in changes}
        yield first.model_copy(update={"completion": done, **rest})
        yield from (event(request, prompt) for prompt in range(1, 4))
        yield end()

    return lambda request: streamed(pieces(request))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (spoilt(prompt=4), "completion 0 of prompt 4, which was not requested"),
        (spoilt(prompt=1), "completion 0 of prompt 1, which .* had come before"),
        (spoilt(sample=1), "completion 1 of prompt 0, which was not requested"),
        (spoilt(scores=None), "completion 0 came without the requested scores"),
        (spoilt(token_ids=np.array([7], np.uint32)), "expected top-k arrays of shape"),
        (spoilt(token_ids=np.array([100, 1], np.uint32)), "ids up to 100; .* vocabulary of 100"),
        (spoilt(token_ids=np.zeros(9, np.uint32)), "9 tokens .* 1 to 8"),
        (spoilt(token_ids=np.zeros(0, np.uint32)), "0 tokens .* 1 to 8"),
        (
            lambda r: streamed([event(r, 0), end()]),
            "4 completions were requested, http.* answered 1",
        ),
        (lambda r: streamed([event(r, p) for p in range(4)]), "cut off before its last item"),
        (lambda r: streamed([end(), end()]), "answered something else"),
        (lambda r: (200, {}, b"<html>"), "answered something else"),
    ],
)
def test_an_answer_that_cannot_be_used_stops_the_run(stub, client, answer, message):
    stub.script = [answer]
    with pytest.raises(TeacherAnswerError, match=message):
        client.generate(PROMPTS, SCORED)
    assert len(stub.requests) == 1


def test_the_rest_goes_to_another_replica(stub):
    with (
        StubTeacher().serving() as other,
        SparseGkdTeacher([stub.url, other.url], timeout=10.0) as client,
    ):
        client.connect()
        gone = problem(503, "shutting down")
        stub.script = [broken_after(3, 1)] + [lambda request: gone] * 100
        assert firsts(client.generate(PROMPTS, SAMPLING)) == [10, 11, 12, 13]
    assert [[int(ids[0]) for ids in request.prompts] for request in other.requests] == [[10, 12]]


def test_completions_that_came_no_longer_count_as_outstanding(stub):
    """At most 20 of 43 tokens are still to come at the third: less than 24 elsewhere."""
    with (
        StubTeacher().serving() as other,
        SparseGkdTeacher([stub.url, other.url], timeout=10.0) as client,
    ):
        client.connect()

        def score(length):
            client.score([(np.arange(length, dtype=np.uint32), 2)], ScoreOptions(3))

        def pieces(request):
            for prompt in (0, 1, 2):
                yield event(request, prompt)
                await_rows(client, 2)
            score(24)  # goes to the other one, which has nothing to do
            yield event(request, 3)
            yield end()

        def meanwhile(request):
            score(6)
            return packed(score_response(request))

        stub.script = [lambda request: streamed(pieces(request))]
        other.script = [meanwhile]
        client.generate(PROMPTS, SCORED)
    assert [len(request.sequences[0].token_ids) for request in stub.requests[1:]] == [6]
    assert [len(request.sequences[0].token_ids) for request in other.requests] == [24]
