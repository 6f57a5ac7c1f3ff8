"""Messages in both media types: one schema, the same values, the same refusals."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared import codec, wire
from shared.errors import InvalidRequestError, MalformedRequestError, PayloadTooLargeError
from shared.protocol import ScoreRequest, ScoreResponse, ScoreSequence, TeacherIdentity
from shared.sparse import SparseLogprobs

BOTH = pytest.mark.parametrize("media_type", [wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE])
MAX = 1 << 20


def load(value, media_type, model=ScoreRequest):
    body = codec.encode(value) if media_type == wire.MSGPACK_MEDIA_TYPE else json.dumps(value)
    data = body if isinstance(body, bytes) else body.encode()
    return wire.load(model, data, media_type, max_bytes=MAX)


def request(**changes):
    sequence = {"token_ids": [1, 2, 3], "completion_start": 1}
    return {"sequences": [{**sequence, **changes}], "top_k": 2}


@BOTH
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_request_survives_the_wire(media_type, data):
    ids = st.integers(0, 2**32 - 1)
    length = data.draw(st.integers(2, 6))
    sequence = ScoreSequence(
        token_ids=data.draw(st.lists(ids, min_size=length, max_size=length)),
        completion_start=1,
        requested_token_ids=data.draw(st.none() | st.just([[5, 6]] * (length - 1))),
    )
    sent = ScoreRequest(sequences=[sequence], top_k=3, temperature=0.7, logprob_dtype="float16")
    got = wire.load(ScoreRequest, wire.dump(sent, media_type), media_type, max_bytes=MAX)
    np.testing.assert_array_equal(got.sequences[0].token_ids, sequence.token_ids)
    assert got.sequences[0].token_ids.dtype == np.uint32
    if sequence.requested_token_ids is None:
        assert got.sequences[0].requested_token_ids is None
    else:
        assert got.sequences[0].requested_token_ids.tolist() == [[5, 6]] * (length - 1)
    assert (got.top_k, got.temperature, got.logprob_dtype) == (3, 0.7, "float16")


@BOTH
def test_an_empty_tail_survives_the_wire(media_type):
    scores = SparseLogprobs(
        token_ids=np.array([[3], [4]], np.uint32),
        logprobs=np.array([[-0.5], [0.0]], np.float32),
        next_token_logprob=np.array([-1.25, -2.5], np.float32),
        tail_logprob=np.array([-3.5, -np.inf], np.float32),
    )
    teacher = TeacherIdentity(model="m", fingerprint="f", dtype="d", backend="b", version="v")
    sent = ScoreResponse(sequences=[scores], teacher=teacher, request_id="r")
    data = wire.dump(sent, media_type)
    got = wire.load(ScoreResponse, data, media_type, max_bytes=MAX).sequences[0]
    assert got.tail_logprob.tolist() == [-3.5, -np.inf]
    assert got.logprobs.tolist() == [[-0.5], [0.0]]
    assert got.next_token_logprob.tolist() == [-1.25, -2.5]
    if media_type == wire.JSON_MEDIA_TYPE:
        assert json.loads(data)["sequences"][0]["tail_logprob"] == [-3.5, None]


@BOTH
@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"token_ids": [1, -2]}, "sequences.0.token_ids", "-2 is outside 0 to 4294967295"),
        ({"token_ids": [1, 2**32]}, "sequences.0.token_ids", "4294967296 is outside"),
        ({"token_ids": [1, 2.5]}, "sequences.0.token_ids", "expected integers"),
        ({"token_ids": [True, False]}, "sequences.0.token_ids", "got bool elements"),
        ({"token_ids": ["1"]}, "sequences.0.token_ids", "expected integers"),
        ({"token_ids": [[1, 2]]}, "sequences.0.token_ids", "expected 1 dimension(s), got 2"),
        ({"token_ids": "abc"}, "sequences.0.token_ids", "got str"),
        ({"token_ids": None}, "sequences.0.token_ids", "got NoneType"),
        ({"requested_token_ids": [[1], [2, 3]]}, "sequences.0.requested_token_ids", "rectangular"),
        ({"requested_token_ids": [1]}, "sequences.0.requested_token_ids", "2 dimension(s), got 1"),
        ({"completion_start": "1"}, "sequences.0.completion_start", "valid integer"),
        ({"completion_start": 1.0}, "sequences.0.completion_start", "valid integer"),
        ({"colour": 1}, "sequences.0.colour", "not permitted"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(media_type, changes, field, message):
    with pytest.raises(InvalidRequestError) as refusal:
        load(request(**changes), media_type)
    assert refusal.value.field == field
    assert message in refusal.value.detail


@BOTH
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e5}, "temperature"),
        ({"logprob_dtype": "float64"}, "logprob_dtype"),
        ({"sequences": {}}, "sequences"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_option_is_refused_with_its_field(media_type, changes, field):
    with pytest.raises(InvalidRequestError) as refusal:
        load({**request(), **changes}, media_type)
    assert refusal.value.field == field


@BOTH
def test_a_float_array_is_no_array_of_token_ids(media_type):
    ids = np.array([1, 2], np.float32)
    value = ids if media_type == wire.MSGPACK_MEDIA_TYPE else ids.tolist()
    with pytest.raises(InvalidRequestError, match="integers"):
        load(request(token_ids=value), media_type)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a":1}x', b"[" * 100_000])
def test_broken_json_is_malformed(body):
    with pytest.raises(MalformedRequestError, match="not valid JSON"):
        wire.load(ScoreRequest, body, wire.JSON_MEDIA_TYPE, max_bytes=MAX)


def test_json_of_too_many_items_is_refused_before_it_is_parsed():
    body = b"[" + b"[]," * (2 << 20) + b"[]]"
    with pytest.raises(PayloadTooLargeError, match="more than 4194304 items"):
        wire.load(ScoreRequest, body, wire.JSON_MEDIA_TYPE, max_bytes=len(body))


@BOTH
def test_a_body_over_the_limit_is_refused(media_type):
    with pytest.raises(PayloadTooLargeError, match="the limit is 10"):
        wire.load(ScoreRequest, b" " * 11, media_type, max_bytes=10)


@BOTH
@pytest.mark.parametrize("value", [None, 1, "text", [], [1]])
def test_a_body_that_is_no_object_is_refused(media_type, value):
    with pytest.raises(InvalidRequestError):
        load(value, media_type)


@pytest.mark.parametrize("leaf", ["x" * 60_000, True, {}, b"x"])
def test_one_odd_leaf_is_refused_before_numpy_pads_the_rest_to_it(leaf):
    token_ids = [1] * 8_000 + [leaf]
    tracemalloc.start()
    with pytest.raises(ValidationError, match="expected integers from 0 to 4294967295, got"):
        ScoreSequence(token_ids=token_ids, completion_start=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
