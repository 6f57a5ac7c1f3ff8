"""Messages in both media types: one schema, the same values, the same refusals."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared import codec, wire
from shared.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MalformedRequestError,
    PayloadTooLargeError,
)
from shared.protocol import (
    Completion,
    GenerateEnd,
    GenerateEvent,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
    TeacherIdentity,
)
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
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1, not 0"),
        ({"temperature": -0.5}, "temperature: Input should be greater than 0, not -0.5"),
        ({"logprob_dtype": "x" * 999}, "'float32' or 'float16', not '" + "x" * 59),
        ({"sequences": {"a": 1}}, "sequences: Input should be a valid list, not a value of type"),
        ({"extra": None}, "extra: not permitted here; the fields are sequences, top_k"),
    ],
)
def test_a_refusal_names_field_limit_and_value(media_type, changes, told):
    with pytest.raises(InvalidRequestError) as refusal:
        load({**request(), **changes}, media_type)
    assert told in refusal.value.detail
    assert len(refusal.value.detail) < 200


@pytest.mark.parametrize(
    ("media_type", "body", "limit"),
    [
        (wire.JSON_MEDIA_TYPE, b'{"a":' * 50_000, sys.getrecursionlimit()),
        (wire.MSGPACK_MEDIA_TYPE, b"\x81\xa1a" * 100_000, 1024),
    ],
)
def test_deep_nesting_is_refused_with_the_limit(media_type, body, limit):
    with pytest.raises(MalformedRequestError, match=f"nested deeper than {limit} levels"):
        wire.load(ScoreRequest, body, media_type, max_bytes=len(body))


@BOTH
def test_a_float_array_is_no_array_of_token_ids(media_type):
    ids = np.array([1, 2], np.float32)
    value = ids if media_type == wire.MSGPACK_MEDIA_TYPE else ids.tolist()
    with pytest.raises(InvalidRequestError, match="integers"):
        load(request(token_ids=value), media_type)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a":1}x', b"[" * 50_000])
def test_broken_json_is_malformed(body):
    with pytest.raises(MalformedRequestError, match="not valid JSON"):
        wire.load(ScoreRequest, body, wire.JSON_MEDIA_TYPE, max_bytes=MAX)


def test_json_of_too_many_items_is_refused_before_it_is_parsed():
    body = b"[" + b"[]," * (2 << 20) + b"[]]"
    with pytest.raises(PayloadTooLargeError, match="more than 1048576 items"):
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


TEACHER = TeacherIdentity(model="m", fingerprint="f", dtype="d", backend="b", version="v")
STREAMS = pytest.mark.parametrize("media_type", list(wire.STREAM_MEDIA_TYPES.values()))


def event(prompt, sample, ids):
    scores = SparseLogprobs(
        token_ids=np.full((len(ids), 1), 10, np.uint32),  # a byte that also ends a line
        logprobs=np.full((len(ids), 1), -0.5, np.float32),
        next_token_logprob=np.full(len(ids), -0.5, np.float32),
        tail_logprob=np.full(len(ids), -np.inf, np.float32),
    )
    completion = Completion(token_ids=ids, finish_reason="stop", scores=scores)
    return GenerateEvent(prompt=prompt, sample=sample, completion=completion, teacher=TEACHER)


def stream(*items, media_type):
    return b"".join(wire.dump(item, media_type) for item in items)


def read(chunks, media_type, max_bytes=MAX):
    return list(wire.stream_messages(chunks, media_type, max_bytes=max_bytes))


EVENTS = (event(1, 0, [10, 1]), event(0, 1, [7, 8, 1]))
END = GenerateEnd(teacher=TEACHER, request_id="r")


@STREAMS
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_stream_survives_being_cut_anywhere(media_type, data):
    body = stream(*EVENTS, END, media_type=media_type)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    chunks = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    first, second, end = read(chunks, media_type)
    assert (first.prompt, first.sample, second.prompt, second.sample) == (1, 0, 0, 1)
    assert first.completion.token_ids.tolist() == [10, 1]
    assert second.completion.scores.token_ids.tolist() == [[10]] * 3
    assert second.completion.scores.tail_logprob.tolist() == [-np.inf] * 3
    assert first.teacher == second.teacher == TEACHER
    assert end == END


@STREAMS
def test_an_item_is_read_before_the_next_one_comes(media_type):
    seen = []

    def chunks():
        for item in (*EVENTS, END):
            yield wire.dump(item, media_type)
            seen.append(item)

    for count, _ in enumerate(wire.stream_messages(chunks(), media_type, max_bytes=MAX)):
        assert len(seen) == count


@STREAMS
def test_a_problem_rides_on_the_last_item(media_type):
    problem = DeadlineExceededError("late").to_problem("r")
    end = GenerateEnd(teacher=TEACHER, request_id="r", problem=problem)
    assert read([stream(EVENTS[0], end, media_type=media_type)], media_type)[1] == end
    assert end.problem.status == 504


@STREAMS
@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_stream_that_is_cut_off_is_malformed(media_type, share):
    body = stream(*EVENTS, END, media_type=media_type)
    with pytest.raises(MalformedRequestError, match=r"cut off|in the middle"):
        read([body[: int(share * len(body))]], media_type)


@STREAMS
def test_what_comes_after_the_last_item_is_malformed(media_type):
    for more in (EVENTS[0], END):
        with pytest.raises(MalformedRequestError, match="goes on after its last item"):
            read([stream(EVENTS[0], END, more, media_type=media_type)], media_type)


@STREAMS
@pytest.mark.parametrize("value", [None, 1, [], {}, {"completion": 1}, {"teacher": {}, "x": 1}])
def test_an_unknown_item_is_refused(media_type, value):
    body = codec.encode(value) if "msgpack" in media_type else json.dumps(value).encode() + b"\n"
    with pytest.raises(InvalidRequestError):
        read([body], media_type)


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        (wire.MSGPACK_STREAM_MEDIA_TYPE, b"\xc1"),
        (wire.MSGPACK_STREAM_MEDIA_TYPE, b"\xdd\xff\xff\xff\xff"),  # a list of 2³² − 1
        (wire.NDJSON_MEDIA_TYPE, b"{\n"),
        (wire.NDJSON_MEDIA_TYPE, b"\n"),
    ],
)
def test_a_broken_stream_is_malformed(media_type, body):
    with pytest.raises(MalformedRequestError, match="not valid"):
        read([body], media_type)


@STREAMS
def test_a_stream_over_the_limit_is_refused_as_soon_as_it_is(media_type):
    body = stream(*EVENTS, END, media_type=media_type)

    def chunks():
        yield body
        raise AssertionError("read on over the limit")

    with pytest.raises(PayloadTooLargeError, match=f"over {len(body) - 1} bytes"):
        read(chunks(), media_type, max_bytes=len(body) - 1)


def test_a_stream_of_too_many_items_is_refused():
    body = codec.encode([[]] * 8_000) * 66
    with pytest.raises(PayloadTooLargeError, match="more than 1048576 items"):
        list(codec.decode_stream([body] * 2, max_bytes=2 * len(body)))
