"""Encode plain structures with numpy arrays as msgpack, and decode them.

An array travels as a map of exactly three keys, ``{"dtype": "<f4", "shape": [T, k], "data": bin}``,
its buffer little-endian and in C order. Decoding trusts no length: the body's size is checked
first, msgpack's own limits keep a forged header from allocating lists and maps, and an array is a
view into the received bytes, so a forged shape allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgpack
import numpy as np

from shared.arrays import MAX_NDIM
from shared.errors import MalformedRequestError, PayloadTooLargeError

MEDIA_TYPE = "application/msgpack"
MAX_DEPTH = 1_024  # msgpack's own limit
# msgpack allocates 8 bytes an element from a list's header alone, at each of up to 1,024 nesting
# levels: this limit bounds what a forged message can allocate to 64 MiB.
MAX_LIST_LENGTH = 8_192
MAX_MAP_LENGTH = 256
MAX_STRING_BYTES = 1 << 20
# An empty list or map is one byte on the wire and about 64 in memory, so a message's items outside
# arrays are counted while it is unpacked.
MAX_ITEMS = 1 << 20

_ARRAY_KEYS = {"dtype", "shape", "data"}
_DTYPES = {name: np.dtype(name) for name in ("<u4", "<f2", "<f4")}
_BROKEN = (ValueError, RecursionError, msgpack.exceptions.UnpackException)


def encode(value: Any) -> bytes:
    """Pack dicts, lists, scalars, strings and numpy arrays.

    Raises:
        TypeError: for an object or array dtype that the format does not carry.
    """
    packed: bytes = msgpack.packb(value, default=_encode_array, use_bin_type=True)
    return packed


def decode(data: bytes | bytearray, *, max_bytes: int) -> Any:
    """Unpack what `encode` made; arrays come back as read-only views into ``data``.

    Raises:
        PayloadTooLargeError: more than ``max_bytes`` bytes, or `MAX_ITEMS` items outside arrays.
        MalformedRequestError: anything that is not one complete, well-formed message.
    """
    if len(data) > max_bytes:
        raise PayloadTooLargeError(f"the body has {len(data)} bytes; the limit is {max_bytes}")
    try:
        return msgpack.unpackb(data, **_bounds(len(data)))
    except _BROKEN as error:
        raise _malformed(error) from error


def decode_stream(chunks: Iterable[bytes], *, max_bytes: int) -> Iterator[Any]:
    """Unpack concatenated messages, and yield each as soon as it is complete.

    Args:
        chunks: the bytes, cut anywhere.
        max_bytes: limit for all chunks together.

    Raises:
        PayloadTooLargeError: more than ``max_bytes`` bytes, or `MAX_ITEMS` items outside arrays.
        MalformedRequestError: something is not well-formed, or the last message is cut short.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max_bytes, **_bounds(max_bytes))
    size = end = 0  # bytes received; end of the last complete message
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLargeError(f"the body has over {max_bytes} bytes, the limit")
        unpacker.feed(chunk)
        try:
            for message in unpacker:
                end = unpacker.tell()
                yield message
        except _BROKEN as error:
            raise _malformed(error) from error
    if end != size:
        raise MalformedRequestError("the body ends in the middle of a message")


def _malformed(error: Exception) -> MalformedRequestError:
    reason = str(error) or type(error).__name__
    if isinstance(error, msgpack.exceptions.StackError):
        reason = f"nested deeper than {MAX_DEPTH} levels"
    return MalformedRequestError(f"the body is not valid msgpack: {reason}")


def _bounds(size: int) -> dict[str, Any]:
    """Return options that bound what msgpack allocates while it unpacks ``size`` bytes."""
    items = 0

    def counted(container: Any) -> Any:
        nonlocal items
        items += 1 + len(container)
        if items > MAX_ITEMS:
            raise PayloadTooLargeError(
                f"the message holds more than {MAX_ITEMS} items; send token ids as arrays"
            )
        return container

    return {
        "raw": False,
        "strict_map_key": True,
        "object_hook": lambda value: _decode_map(counted(value)),
        "list_hook": counted,
        "max_bin_len": size,
        "max_str_len": min(size, MAX_STRING_BYTES),
        "max_array_len": MAX_LIST_LENGTH,
        "max_map_len": MAX_MAP_LENGTH,
        "max_ext_len": 0,
    }


def _encode_array(value: Any) -> dict[str, Any]:
    if isinstance(value, np.generic):
        raise TypeError(f"pass a Python scalar instead of {type(value).__name__}")
    if not isinstance(value, np.ndarray):
        raise TypeError(f"cannot encode {type(value).__name__}")
    dtype = value.dtype.newbyteorder("<").str
    if dtype not in _DTYPES:
        raise TypeError(f"cannot encode an array of {value.dtype}; use one of {sorted(_DTYPES)}")
    little = np.ascontiguousarray(value, dtype=_DTYPES[dtype])
    return {"dtype": dtype, "shape": list(value.shape), "data": little.tobytes()}


def _decode_map(value: dict[str, Any]) -> Any:
    if value.keys() != _ARRAY_KEYS:
        return value
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MalformedRequestError(
            f"array dtype {dtype!r:.40} is not one of {', '.join(sorted(_DTYPES))}"
        )
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_NDIM:
        raise MalformedRequestError(f"array shape must be a list of 1 to {MAX_NDIM} sizes")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise MalformedRequestError("array shape must hold non-negative integers")
    if not isinstance(data, bytes):
        raise MalformedRequestError("array data must be a bin value")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if expected != len(data):
        raise MalformedRequestError(
            f"an array of {dtype} and shape {shape} needs {expected} bytes, not {len(data)}"
        )
    return np.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape)
