"""A server of before there were several models, and one of a later release than the trainer."""

import numpy as np
import pytest

from shared import codec, wire
from shared.errors import TeacherAnswerError
from shared.protocol import Capabilities, GenerateRequest, InfoResponse, Limits, ScoreRequest
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support import stub as stubs
from tests.support.stub import IDENTITY, StubTeacher, serving

SEQUENCE = (np.arange(2, 8, dtype=np.uint32), 3)
KNOWN = {
    "/v1/score": {"sequences", "top_k", "temperature", "logprob_dtype"},
    "/v1/generate": {
        "prompts", "n", "max_new_tokens", "temperature", "top_p", "sampling_top_k",
        "stop_token_ids", "seed", "top_k", "score_temperature", "logprob_dtype", "stream",
    },
}  # fmt: skip


class OlderServer:
    """A stub that knows the fields of the first release, and refuses any other."""

    def __init__(self):
        self.inner = StubTeacher()

    def get(self, path):
        if path != "/v1/info":
            return self.inner.get(path)
        told = stubs.info().model_dump()
        del told["models"], told["tokenizer"]["encoding"], told["capabilities"]["sample_seed"]
        return 200, {"Content-Type": wire.MSGPACK_MEDIA_TYPE}, codec.encode(told)

    def post(self, path, body):
        sent = codec.decode(body, max_bytes=1 << 20)
        unknown = sent.keys() - KNOWN[path]
        if unknown:
            return stubs.problem(422, f"{min(unknown)}: not permitted here")
        return self.inner.post(path, body)


@pytest.fixture
def older():
    with serving(OlderServer()) as url:
        yield url


@pytest.mark.parametrize("name", ["", "math"], ids=["unnamed", "named"])
def test_an_older_server_is_one_teacher_and_gets_no_field_it_does_not_know(older, name):
    with SparseGkdTeacher([older], timeout=5, name=name) as teacher:
        assert teacher.connect().teacher == IDENTITY
        (scores,) = teacher.score([SEQUENCE], ScoreOptions(4, 1.0))
        assert len(scores) == 3
        sampling = Sampling(max_new_tokens=4, temperature=0.0, seed=1, stop_token_ids=[1], top_k=2)
        (written,) = teacher.generate([SEQUENCE[0]], sampling)
        assert written.token_ids.tolist() == [2, 1]


def test_a_model_that_an_older_server_cannot_have_is_an_error(older):
    with (
        SparseGkdTeacher([older], timeout=5, model="code") as teacher,
        pytest.raises(TeacherAnswerError, match="serves no model code; it serves stub"),
    ):
        teacher.connect()


@pytest.mark.parametrize(("model", "sent"), [("stub", None), ("math", "math")])
def test_a_model_is_named_where_it_is_not_the_servers_first(model, sent):
    math = IDENTITY.model_copy(update={"model": "math"})
    stub = StubTeacher(info=stubs.info(models=[IDENTITY, math]))
    with stub.serving(), SparseGkdTeacher([stub.url], timeout=5, model=model) as teacher:
        who = teacher.connect().teacher
        stub.script = [lambda request: stubs.packed(stubs.score_response(request, who))]
        teacher.score([SEQUENCE], ScoreOptions(4, 1.0))
    assert [request.model for request in stub.requests] == [sent]


def test_what_a_later_server_says_beside_is_ignored():
    told = stubs.info().model_dump()
    for part in (told, told["tokenizer"], told["limits"], told["capabilities"]):
        part["new_in_a_later_release"] = True
    assert InfoResponse.model_validate(told) == stubs.info()
    assert {Limits.model_validate(told["limits"])} == {Limits()}
    assert Capabilities.model_validate(told["capabilities"]) == stubs.info().capabilities


@pytest.mark.parametrize("media_type", [wire.JSON_MEDIA_TYPE, wire.MSGPACK_MEDIA_TYPE])
@pytest.mark.parametrize(
    "request_", [ScoreRequest(sequences=[], top_k=1), GenerateRequest(prompts=[])], ids=["s", "g"]
)
def test_a_request_without_none_reads_as_it_was(media_type, request_):
    body = wire.dump(request_, media_type)
    assert b"model" not in body
    assert wire.load(type(request_), body, media_type, max_bytes=1 << 20) == request_
