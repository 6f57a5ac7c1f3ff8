"""Requested ids on their way to the teacher: what is sent, split, checked and refused."""

import httpx
import numpy as np
import pytest

from shared import wire
from shared.errors import ConfigurationError, TeacherAnswerError
from shared.protocol import ScoreRequest, ScoreResponse
from shared.sparse import SparseLogprobs
from student_trainer.config.arguments import TeacherArguments
from student_trainer.config.training_arguments import DistillArguments
from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.compatible import check_capabilities
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.unit.shared.test_validation import info

SEQUENCES = [(np.arange(5, dtype=np.uint32), 2), (np.arange(3, dtype=np.uint32), 1)]
REQUESTED = [np.full((3, 2), 7, np.uint32), np.full((2, 2), 9, np.uint32)]


def client_of(width_answered, **limits):
    """A client whose teacher answers log-probs of ``width_answered`` requested ids."""
    received = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked = wire.load(ScoreRequest, request.content, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 20)
        received.append(asked)
        sequences = []
        for sequence in asked.sequences:
            rows = len(sequence.token_ids) - sequence.completion_start
            floats = np.full((rows, asked.top_k), np.log(0.1), np.float32)
            more = None
            if width_answered is not None:
                more = np.full((rows, width_answered), np.log(0.1), np.float32)
            sequences.append(
                SparseLogprobs(
                    token_ids=np.tile(np.arange(asked.top_k, dtype=np.uint32), (rows, 1)),
                    logprobs=floats,
                    next_token_logprob=floats[:, 0], tail_logprob=floats[:, 0],
                    requested_logprobs=more,
                )
            )  # fmt: skip
        body = ScoreResponse(sequences=sequences, teacher=info().teacher, request_id="r")
        packed = httpx.ByteStream(wire.dump(body, wire.MSGPACK_MEDIA_TYPE))
        return httpx.Response(200, stream=packed)

    client = SparseGkdTeacher(["http://teacher"], timeout=5.0)
    client._replicas.http._client = httpx.Client(transport=httpx.MockTransport(answer))
    client._info = info(limits=limits)
    return client, received


def test_each_sequence_carries_its_own_ids():
    client, received = client_of(2)
    scores = client.score(SEQUENCES, ScoreOptions(4), requested=REQUESTED)
    assert [s.requested_logprobs.shape for s in scores] == [(3, 2), (2, 2)]
    for sent, ids in zip(received[0].sequences, REQUESTED, strict=True):
        assert sent.requested_token_ids.tolist() == ids.tolist()


def test_requests_are_split_by_top_k_and_requested_ids_together():
    # (3 + 2 rows) x (4 + 2) = 30 log-probs; without the requested ids it would be 20
    client, received = client_of(2, max_logprobs=29)
    assert len(client.score(SEQUENCES, ScoreOptions(4), requested=REQUESTED)) == 2
    assert [len(request.sequences) for request in received] == [1, 1]


@pytest.mark.parametrize("answered", [None, 1, 3])
def test_an_answer_of_another_width_is_refused(answered):
    client, _ = client_of(answered)
    with pytest.raises(TeacherAnswerError, match="sequence 0: expected log-probs of 2 requested"):
        client.score(SEQUENCES, ScoreOptions(4), requested=REQUESTED)


def test_log_probs_that_were_not_requested_are_refused():
    client, _ = client_of(2)
    with pytest.raises(TeacherAnswerError, match="expected log-probs of 0 requested"):
        client.score(SEQUENCES, ScoreOptions(4))


@pytest.mark.parametrize(
    ("capabilities", "count", "message"),
    [
        ({"requested_token_ids": False}, 1, "cannot score requested ids"),
        ({"requested_token_ids": False}, None, "16, the default for --beta 1: .* give 0"),
        ({}, 5, "--request_student_top_m 5 is over the teacher's limit of 4"),
    ],
)
def test_what_the_teacher_cannot_score_is_refused_at_connect(
    tmp_path, capabilities, count, message
):
    arguments = DistillArguments(output_dir=str(tmp_path), beta=1.0, request_student_top_m=count)
    teacher = TeacherArguments(["http://teacher"], top_k_logprobs=8)
    with pytest.raises(ConfigurationError, match=message):
        check_capabilities(info(**capabilities), arguments, teacher)
    arguments.request_student_top_m = 0
    check_capabilities(info(**capabilities), arguments, teacher)
