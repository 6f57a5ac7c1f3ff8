"""msgpack with arrays: what goes in comes out, and nothing forged is believed."""

import tracemalloc
from contextlib import contextmanager

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared import codec
from shared.errors import MalformedRequestError, PayloadTooLargeError, ProtocolError

MAX = 64 << 20

arrays = st.sampled_from(["<u4", "<f2", "<f4"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0))
)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
messages = st.recursive(
    scalars | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4).filter(
            lambda value: value.keys() != {"dtype", "shape", "data"}
        )
    ),
    max_leaves=12,
)


def same(a, b):
    """Equality to the bit, so that NaN equals itself and −0.0 does not equal 0.0."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def status_of(body):
    try:
        codec.decode(body, max_bytes=MAX)
    except ProtocolError as error:
        return error.status
    return 200


@contextmanager
def allocating_at_most(limit):
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= limit, f"{peak} bytes were allocated"


@settings(max_examples=150, deadline=None)
@given(messages)
def test_what_was_encoded_decodes_to_the_same_bits(message):
    assert same(message, codec.decode(codec.encode(message), max_bytes=MAX))


@settings(max_examples=200, deadline=None)
@given(messages, st.data())
def test_damaged_bytes_never_raise_anything_but_a_refusal(message, data):
    body = bytearray(codec.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    assert status_of(bytes(body)) in (200, 400, 413)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_a_refusal(body):
    assert status_of(body) in (200, 400, 413)


def test_a_big_endian_array_travels_little_endian():
    decoded = codec.decode(codec.encode(np.arange(3, dtype=">u4")), max_bytes=MAX)
    assert decoded.dtype.str == "<u4"
    assert decoded.tolist() == [0, 1, 2]


def test_a_strided_array_travels_in_c_order():
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert codec.decode(codec.encode(matrix), max_bytes=MAX).tolist() == matrix.tolist()


def test_a_decoded_array_is_a_read_only_view():
    decoded = codec.decode(codec.encode(np.zeros(4, np.float32)), max_bytes=MAX)
    with pytest.raises(ValueError, match="read-only"):
        decoded[0] = 1.0


@pytest.mark.parametrize("value", [np.zeros(2, np.int64), np.zeros(2), np.float32(1), object()])
def test_encoding_refuses_what_the_format_does_not_carry(value):
    with pytest.raises(TypeError):
        codec.encode({"x": value})


def forged(**changes):
    array = {"dtype": "<f4", "shape": [2, 3], "data": bytes(24), **changes}
    return msgpack.packb({"x": array})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [1 << 40]}, "needs 4398046511104 bytes, not 24"),
        ({"shape": [1 << 62, 1 << 62, 1 << 62]}, "bytes, not 24"),
        ({"shape": [0, 1 << 62]}, "needs 0 bytes, not 24"),
        ({"shape": [2, 2]}, "needs 16 bytes, not 24"),
        ({"shape": [-2, -3]}, "non-negative"),
        ({"shape": [2.0, 3]}, "non-negative integers"),
        ({"shape": [True, 6]}, "non-negative integers"),
        ({"shape": [1, 1, 2, 3]}, "1 to 3 sizes"),
        ({"shape": []}, "1 to 3 sizes"),
        ({"shape": "23"}, "must be a list"),
        ({"dtype": "<f8"}, "dtype '<f8' is not one of"),
        ({"dtype": "|O"}, "dtype '|O' is not one of"),
        ({"dtype": ">f4"}, "dtype '>f4' is not one of"),
        ({"dtype": ["<f4"]}, "is not one of"),
        ({"data": "text"}, "must be a bin value"),
        ({"data": None}, "must be a bin value"),
    ],
)
def test_a_forged_array_is_refused_before_it_is_allocated(changes, reason):
    body = forged(**changes)
    with allocating_at_most(1 << 20), pytest.raises(MalformedRequestError) as refusal:
        codec.decode(body, max_bytes=MAX)
    assert reason in refusal.value.detail


HUGE = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\xdd" + HUGE, id="list of 4 billion"),
        pytest.param(b"\xdf" + HUGE, id="map of 4 billion"),
        pytest.param(b"\xc6" + HUGE, id="bin of 4 GB"),
        pytest.param(b"\xdb" + HUGE, id="string of 4 GB"),
        pytest.param(b"\xc9" + HUGE + b"\x01", id="extension of 4 GB"),
        pytest.param(b"\xd4\x01\x00", id="extension of 1 byte"),
        pytest.param(b"\xd6\xff\x00\x00\x00\x00", id="timestamp"),
        pytest.param(b"\x81\x01\x02", id="integer as key"),
        pytest.param(b"\xa1\xff", id="text that is not UTF-8"),
        pytest.param(b"\xc1", id="the unused byte"),
        pytest.param(b"\x92\x01", id="truncated"),
        pytest.param(b"\x01\x02", id="two messages"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_forged_header_is_refused_before_it_is_believed(body):
    with allocating_at_most(1 << 20), pytest.raises(MalformedRequestError):
        codec.decode(body, max_bytes=MAX)


@pytest.mark.parametrize("header", [b"\x91", b"\x81\xa1a", b"\xdc\x20\x00"])
def test_deep_nesting_is_refused_with_bounded_memory(header):
    # The last header claims 8,192 elements at every level; msgpack stops at its 1,024th.
    with allocating_at_most(72 << 20), pytest.raises(MalformedRequestError):
        codec.decode(header * 100_000, max_bytes=MAX)


@pytest.mark.parametrize("item", [b"\x90", b"\x80", b"\xc0", b"\x91\xc0"])
def test_many_tiny_items_are_refused_long_before_the_memory_is_full(item):
    body = b"\xdc" + (500).to_bytes(2, "big") + (b"\xdc\x1f\x40" + item * 8_000) * 500
    with pytest.raises(PayloadTooLargeError, match="more than 1048576 items"):
        codec.decode(body, max_bytes=MAX)


def test_a_body_over_the_limit_is_refused_with_both_numbers():
    body = codec.encode({"x": np.zeros(100, np.float32)})
    with pytest.raises(PayloadTooLargeError, match=f"{len(body)} bytes; the limit is 99"):
        codec.decode(body, max_bytes=99)
    assert codec.decode(body, max_bytes=len(body))["x"].shape == (100,)
