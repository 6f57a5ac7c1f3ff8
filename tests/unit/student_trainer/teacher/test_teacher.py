"""The teacher client against a socket that answers what each test tells it to."""

import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from shared import wire
from shared.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    PayloadTooLargeError,
    TeacherAnswerError,
    TeacherChangedError,
    TeacherUnreachableError,
    TokenizerMismatchError,
)
from shared.protocol import Limits, ScoreResponse
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support.stub import (
    IDENTITY,
    StubTeacher,
    info,
    packed,
    problem,
    score_response,
    scores,
)

OTHER = IDENTITY.model_copy(update={"fingerprint": "f" * 64})


@pytest.fixture
def stub():
    with StubTeacher().serving() as stub:
        yield stub


def connected(*stubs, **options):
    client = SparseGkdTeacher([s.url for s in stubs], **{"timeout": 5.0, **options})
    client.connect()
    return client


def sequences(*shapes):
    """(token_ids, completion_start) pairs of (length, start) shapes."""
    return [(np.arange(length, dtype=np.uint32), start) for length, start in shapes]


def test_scores_come_back_in_order_and_traffic_is_counted(stub):
    with connected(stub) as client:
        client.take_traffic()
        answers = client.score(sequences((6, 2), (9, 8), (4, 1)), ScoreOptions(3, temperature=0.7))
        received, scored = client.take_traffic()
        assert client.take_traffic() == (0, 0)
    assert [answer.token_ids.shape for answer in answers] == [(4, 3), (1, 3), (3, 3)]
    (request,) = stub.requests
    assert (request.top_k, request.temperature) == (3, 0.7)
    assert scored == 8
    assert received > 8 * 3 * 8


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        (Limits(max_sequences=2), [2, 2, 1]),
        (Limits(max_tokens=20), [2, 2, 1]),  # 10 tokens each
        (Limits(max_logprobs=50), [2, 2, 1]),  # 8 rows × 3 each
    ],
)
def test_work_is_split_to_the_teachers_limits(stub, limits, sizes):
    stub.info = info(limits=limits)
    with connected(stub) as client:
        answers = client.score(sequences(*[(10, 2)] * 5), ScoreOptions(3))
    assert [len(request.sequences) for request in stub.requests] == sizes
    assert len(answers) == 5


@pytest.mark.parametrize("room", [300, 700, 1500, 1 << 20])
def test_a_request_holds_what_fits_its_bytes_and_no_more(stub, room):
    """Requested ids make sequences of equal length differ in bytes."""
    stub.info = info(limits=Limits(max_body_bytes=room))
    shapes = sequences(*[(10, 2)] * 12)
    requested = [np.zeros((8, width), np.uint32) for width in (0, 1, 2, 9) * 3]
    stub.script = [lambda request: packed(with_requested(score_response(request), request))] * 12
    with connected(stub) as client:
        answers = client.score(shapes, ScoreOptions(3), requested=requested)
    assert [answer.requested_logprobs.shape[1] for answer in answers] == [0, 1, 2, 9] * 3
    sizes = [len(wire.dump(request, wire.MSGPACK_MEDIA_TYPE)) for request in stub.requests]
    for request, following, size in zip(stub.requests, stub.requests[1:], sizes, strict=False):
        more = request.sequences + following.sequences[:1]
        longer = request.model_copy(update={"sequences": more})
        assert size <= room or len(request.sequences) == 1
        assert len(wire.dump(longer, wire.MSGPACK_MEDIA_TYPE)) > room - 4
    assert (len(stub.requests) == 1) == (room == 1 << 20)


def with_requested(response, request):
    return response.model_copy(
        update={
            "sequences": [
                score.model_copy(
                    update={
                        "requested_logprobs": np.zeros(sequence.requested_token_ids.shape, "f4")
                    }
                )
                for score, sequence in zip(response.sequences, request.sequences, strict=True)
            ]
        }
    )


@pytest.mark.parametrize("status", [413, 504])
@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_what_is_too_much_is_asked_in_halves(stub, status, most, caplog):
    def answer(request):
        if len(request.sequences) > most:
            return problem(status, "too much")
        return packed(score_response(request))

    stub.script = [answer] * 50
    lengths = list(range(10, 17))
    with caplog.at_level(logging.WARNING), connected(stub) as client:
        answers = client.score(sequences(*[(length, 2) for length in lengths]), ScoreOptions(3))
    assert [len(scores) for scores in answers] == [length - 2 for length in lengths]
    answered = [request for request in stub.requests if len(request.sequences) <= most]
    asked = [len(sequence.token_ids) for request in answered for sequence in request.sequences]
    assert asked == lengths
    assert "A request of 7 is sent in halves: too much" in caplog.text


def test_what_a_ready_teacher_does_not_answer_in_time_is_asked_in_halves(stub, caplog):
    """The server's own deadline may be later than the client's patience."""
    over = threading.Event()

    def answer(request):
        if len(request.sequences) > 1:
            over.wait(20)
        return packed(score_response(request))

    stub.script = [answer] * 3
    with caplog.at_level(logging.WARNING), connected(stub, timeout=1.0) as client:
        answers = client.score(sequences((6, 2), (9, 2)), ScoreOptions(3))
        over.set()
    assert [len(scores) for scores in answers] == [4, 7]
    assert "in halves: " in caplog.text
    assert "is ready, but has not answered in 1 s" in caplog.text


def test_a_teacher_that_hangs_and_is_not_ready_is_not_asked_in_halves(stub):
    over = threading.Event()
    with connected(stub, timeout=1.0) as client:
        stub.not_ready = 10**6
        stub.script = [lambda request: (over.wait(20), problem(503, "too late"))[1]] * 9
        with pytest.raises(
            TeacherUnreachableError, match=r"within 1 s: (timed out|no head of an answer)"
        ):
            client.score(sequences((6, 2), (9, 2)), ScoreOptions(3))
        over.set()
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(413, "the limit is 9"), PayloadTooLargeError),
        (problem(504, "the limit is 9"), DeadlineExceededError),
        ((504, {}, b"<html>gateway"), DeadlineExceededError),
    ],
)
def test_a_sequence_that_is_too_much_alone_is_named(stub, answer, error):
    def refuse(request):
        alone = len(request.sequences) == 1 and len(request.sequences[0].token_ids) < 30
        return packed(score_response(request)) if alone else answer

    stub.script = [refuse] * 50
    with connected(stub) as client, pytest.raises(error) as caught:
        client.score(sequences((6, 2), (7, 2), (30, 2), (8, 2)), ScoreOptions(3))
    assert "sequence 2, of 30 tokens, is too much alone" in str(caught.value)
    assert "--request-timeout (504)" in str(caught.value)
    assert len(stub.requests) == 6  # 4, 2, 1, 1, 2, 1


def test_log_probs_travel_in_the_type_asked_for(stub):
    for dtype in ("float16", "float32"):
        with connected(stub, logprob_dtype=dtype) as client:
            client.score(sequences((6, 2)), ScoreOptions(3))
            sampling = Sampling(2, temperature=0.0, seed=5, stop_token_ids=[1], top_k=4)
            client.generate([np.array([3], np.uint32)], sampling)
        assert [request.logprob_dtype for request in stub.requests[-2:]] == [dtype] * 2


def test_no_sequences_ask_nothing(stub):
    with connected(stub) as client:
        assert client.score([], ScoreOptions(3)) == []
    assert stub.requests == []


@pytest.mark.parametrize(
    "failure",
    [
        problem(503, "loading"),
        problem(429, "full", **{"Retry-After": "0"}),
        (502, {}, b"bad gateway"),
        (200, {"Content-Length": "1000", "Connection": "close"}, b"cut off"),
    ],
    ids=["not ready", "overloaded", "gateway", "cut off"],
)
def test_what_fails_in_passing_is_tried_again(stub, failure, caplog):
    stub.script = [lambda request: failure] * 2
    with caplog.at_level(logging.WARNING), connected(stub) as client:
        assert len(client.score(sequences((6, 2)), ScoreOptions(3))) == 1
    assert len(stub.requests) == 3
    assert caplog.text.count("Teacher call failed") == 2


def test_retry_after_is_honoured(stub):
    stub.script = [lambda request: problem(429, "full", **{"Retry-After": "1"})]
    since = time.monotonic()
    with connected(stub) as client:
        client.score(sequences((6, 2)), ScoreOptions(3))
    assert time.monotonic() - since >= 1.0


def test_a_retry_after_beyond_the_timeout_is_cut_to_it(stub):
    stub.script = [lambda request: problem(429, "full", **{"Retry-After": "3600"})]
    with connected(stub, timeout=1.0) as client:
        assert len(client.score(sequences((6, 2)), ScoreOptions(3))) == 1


def test_a_teacher_that_stays_down_is_named_after_the_timeout(stub):
    stub.script = [lambda request: problem(503, "still loading")] * 100
    with (
        connected(stub, timeout=1.0) as client,
        pytest.raises(TeacherUnreachableError) as caught,
    ):
        client.score(sequences((6, 2)), ScoreOptions(3))
    assert stub.url in str(caught.value)
    assert "within 1 s: still loading" in str(caught.value)


def test_a_refusal_is_not_tried_again(stub):
    stub.script = [lambda request: problem(422, "top_k 999 is over the limit 10")]
    with connected(stub) as client, pytest.raises(InvalidRequestError, match="over the limit 10"):
        client.score(sequences((6, 2)), ScoreOptions(3))
    assert len(stub.requests) == 1


def changed(field, value):
    """A score answer with one array changed in its second row."""

    def answer(request):
        response = score_response(request)
        arrays = {name: getattr(response.sequences[1], name).copy() for name in ARRAYS}
        arrays[field][1] = value
        spoilt = response.sequences[1].model_copy(update=arrays)
        sequences = [response.sequences[0], spoilt]
        return packed(ScoreResponse(sequences=sequences, teacher=IDENTITY, request_id="r"))

    return answer


ARRAYS = ("token_ids", "logprobs", "next_token_logprob", "tail_logprob")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (changed("logprobs", np.nan), r"sequence 1: the teacher answered logprobs\[1, 0\] = nan"),
        (changed("next_token_logprob", -np.inf), r"sequence 1.*next_token_logprob\[1\] = -inf"),
        (changed("tail_logprob", np.nan), r"sequence 1.*tail_logprob\[1\] = nan"),
        (changed("token_ids", 100), r"sequence 1: token id 100 is outside.*vocabulary of 100"),
        (lambda r: packed(score_response(r.model_copy(update={"top_k": 2}))), "expected top-k"),
        (
            lambda r: packed(score_response(r.model_copy(update={"sequences": r.sequences[:1]}))),
            "2 sequences were sent, http.* answered 1",
        ),
        (lambda r: (200, {}, b"<html>"), "answered something else"),
        (lambda r: packed(scores(2, 3)), "answered something else"),
    ],
)
def test_an_answer_that_cannot_be_used_stops_the_run(stub, answer, message):
    stub.script = [answer]
    with connected(stub) as client, pytest.raises(TeacherAnswerError, match=message):
        client.score(sequences((6, 2), (8, 3)), ScoreOptions(3))
    assert len(stub.requests) == 1


def test_an_empty_tail_is_a_good_answer(stub):
    stub.script = [changed("tail_logprob", -np.inf)]
    with connected(stub) as client:
        assert (
            client.score(sequences((6, 2), (8, 3)), ScoreOptions(3))[1].tail_logprob[1] == -np.inf
        )


def test_another_teacher_at_the_address_stops_the_run_and_shows_both(stub):
    with connected(stub) as client:
        stub.info = info(OTHER)
        with pytest.raises(TeacherChangedError) as caught:
            client.score(sequences((6, 2)), ScoreOptions(3))
    assert IDENTITY.fingerprint in str(caught.value)
    assert OTHER.fingerprint in str(caught.value)
    assert "--accept_teacher_change" in str(caught.value)


def test_another_teacher_is_accepted_when_told_so(stub, caplog):
    with connected(stub, accept_change=True) as client:
        stub.info = info(OTHER)
        client.score(sequences((6, 2)), ScoreOptions(3))
        assert client.info.teacher == OTHER
        caplog.clear()
        client.score(sequences((6, 2)), ScoreOptions(3))
    assert "another teacher" not in caplog.text  # said once


def test_another_vocabulary_is_never_accepted(stub):
    with connected(stub, accept_change=True) as client:
        stub.info = info(OTHER, vocab_size=101)
        with pytest.raises(TokenizerMismatchError, match="another tokenizer too: 101 rows"):
            client.score(sequences((6, 2)), ScoreOptions(3))


def test_a_process_does_not_wait_for_answers_that_nobody_needs(stub):
    """In a process of its own: it ends while the teacher still thinks."""
    asks = (
        "import sys, time, numpy as np\n"
        "from student_trainer.teacher import ScoreOptions, SparseGkdTeacher\n"
        "client = SparseGkdTeacher([sys.argv[1]], timeout=60)\n"
        "client.connect()\n"
        "sequence = np.arange(6, dtype=np.uint32), 2\n"
        "client.submit(client.score, [sequence], ScoreOptions(3))\n"
        "time.sleep(0.5)\n"
        "sys.exit(3)\n"
    )
    over = threading.Event()
    stub.script = [lambda request: (over.wait(60), problem(503, "too late"))[1]]
    process = subprocess.Popen([sys.executable, "-c", asks, stub.url])
    try:
        assert process.wait(timeout=40) == 3
        assert not over.is_set()
    finally:
        over.set()
        process.kill()


def test_idle_replicas_take_turns(stub):
    with StubTeacher().serving() as other, connected(stub, other) as client:
        for _ in range(4):
            client.score(sequences((6, 2)), ScoreOptions(3))
    assert (len(stub.requests), len(other.requests)) == (2, 2)


def test_an_address_with_a_path_is_told_at_once(stub):
    client = SparseGkdTeacher([f"{stub.url}/v1"], timeout=60)
    with pytest.raises(TeacherAnswerError, match="give the address alone"):
        client.connect()


def test_replicas_must_be_one_teacher(stub):
    with (
        StubTeacher(info(OTHER)).serving() as other,
        pytest.raises(TeacherChangedError, match="the replicas are different teachers"),
    ):
        connected(stub, other)


def test_another_protocol_version_is_refused(stub):
    stub.info = info(protocol_version=2)
    with pytest.raises(TeacherAnswerError, match="speaks protocol version 2"):
        connected(stub)


def test_a_loading_teacher_is_waited_for_visibly(stub, caplog):
    stub.not_ready = 2
    with caplog.at_level(logging.WARNING), connected(stub):
        pass
    assert "Waiting for the teacher" in caplog.text
    assert "answers 503 to /ready, as while it loads its model;" in caplog.text
    assert "Is the server running?" not in caplog.text


def test_requests_go_to_the_replica_with_fewer_tokens_outstanding(stub):
    with StubTeacher().serving() as other, connected(stub, other) as client:

        def meanwhile(request):
            client.score(sequences((6, 2)), ScoreOptions(3))  # while the first call is under way
            return packed(score_response(request))

        stub.script = [meanwhile]
        client.score(sequences((20, 2)), ScoreOptions(3))
    assert [len(r.sequences[0].token_ids) for r in stub.requests] == [20]
    assert [len(r.sequences[0].token_ids) for r in other.requests] == [6]


def test_completions_come_with_their_scores(stub):
    prompts = [np.array([3, 4], np.uint32), np.array([7], np.uint32)]
    sampling = Sampling(max_new_tokens=8, temperature=0.0, seed=5, stop_token_ids=[1, 9])
    with connected(stub) as client:
        completions = client.generate(prompts, replace(sampling, top_k=4))
        client.generate(prompts, sampling)
    assert [c.token_ids.tolist() for c in completions] == [[3, 1], [7, 1]]
    assert completions[0].scores.token_ids.shape == (2, 4)
    with_scores, without = stub.requests
    assert (with_scores.top_k, without.top_k) == (4, None)
    assert with_scores.stop_token_ids.tolist() == [1, 9]


def test_a_closed_client_refuses(stub):
    client = connected(stub)
    client.close()
    with pytest.raises(TeacherUnreachableError, match="closed"):
        client.score(sequences((6, 2)), ScoreOptions(3))
