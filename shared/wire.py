"""Encode messages as bytes and decode them, in either media type, singly or as a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from shared import codec
from shared.errors import InvalidRequestError, MalformedRequestError, PayloadTooLargeError
from shared.protocol import GenerateEnd, GenerateEvent, RequestMessage
from shared.unknown_fields import UNKNOWN_FIELD

JSON_MEDIA_TYPE = "application/json"
MSGPACK_MEDIA_TYPE = codec.MEDIA_TYPE
NDJSON_MEDIA_TYPE = "application/x-ndjson"  # one JSON document a line
MSGPACK_STREAM_MEDIA_TYPE = "application/x-msgpack-stream"  # concatenated maps
# The media type of a stream, by the media type of its messages.
STREAM_MEDIA_TYPES = {
    JSON_MEDIA_TYPE: NDJSON_MEDIA_TYPE,
    MSGPACK_MEDIA_TYPE: MSGPACK_STREAM_MEDIA_TYPE,
}

# Parsed JSON takes up to 30 times the memory of its text, and the parser holds the GIL, so large
# arrays must come as msgpack.
MAX_JSON_ITEMS = 1 << 20
MAX_JSON_CONTAINERS = 1 << 16
# The largest JSON body of a request, in which the escaped text of a long context fits.
MAX_JSON_REQUEST_BYTES = 8 << 20
# Types of pydantic errors whose message already tells the value, or that it is missing.
_SAY_ALL = ("array", "value_error", "missing", "too_long", UNKNOWN_FIELD)
# An integer with more digits is read as a float, which is outside every field's range.
_MOST_DIGITS = 300
_COUNTED_BYTES = 1 << 20

M = TypeVar("M", bound=BaseModel)


def dump(message: BaseModel, media_type: str) -> bytes:
    """Encode a message in ``media_type``; for the media type of a stream, as one item of it.

    A request holds no field of None, because an older server may not know the field.
    """
    lean = isinstance(message, RequestMessage)
    if media_type in (MSGPACK_MEDIA_TYPE, MSGPACK_STREAM_MEDIA_TYPE):
        return codec.encode(message.model_dump(exclude_none=lean))
    text = message.model_dump_json(exclude_none=lean).encode()
    return text + b"\n" if media_type == NDJSON_MEDIA_TYPE else text


def load(model: type[M], data: bytes | bytearray, media_type: str, *, max_bytes: int) -> M:
    """Parse and validate one message.

    Raises:
        PayloadTooLargeError: more than ``max_bytes`` bytes, or too many items.
        MalformedRequestError: not well-formed in this media type.
        InvalidRequestError: well-formed, but not such a message; names the field.
    """
    if media_type == MSGPACK_MEDIA_TYPE:
        value = codec.decode(data, max_bytes=max_bytes)
    else:
        value = _load_json(data, max_bytes)
    return _validate(model, value)


def stream_messages(
    chunks: Iterable[bytes], media_type: str, *, max_bytes: int
) -> Iterator[GenerateEvent | GenerateEnd]:
    """Parse and validate a streamed answer, and yield each item as soon as it is complete.

    Args:
        chunks: the body, cut anywhere.
        media_type: of the stream, msgpack or JSON lines.
        max_bytes: limit for the whole body.

    Raises:
        PayloadTooLargeError: more than ``max_bytes`` bytes, or too many items.
        MalformedRequestError: not well-formed, cut off before its `GenerateEnd`, or going on
            after it.
        InvalidRequestError: an item is neither a `GenerateEvent` nor a `GenerateEnd`.
    """
    if media_type == MSGPACK_STREAM_MEDIA_TYPE:
        values = codec.decode_stream(chunks, max_bytes=max_bytes)
    else:
        values = (_load_json(line, max_bytes) for line in _lines(chunks, max_bytes))
    ended = False
    for value in values:
        if ended:
            raise MalformedRequestError("the stream goes on after its last item")
        ended = isinstance(value, dict) and "completion" not in value
        yield _validate(GenerateEnd, value) if ended else _validate(GenerateEvent, value)
    if not ended:
        raise MalformedRequestError("the stream was cut off before its last item")


def _lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield lines without their ends; refuse a body that ends in the middle of one."""
    size = 0
    line = bytearray()
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLargeError(f"the body has over {max_bytes} bytes, the limit")
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield bytes(line) + end
            line.clear()
        line += rest
    if line:
        raise MalformedRequestError("the body ends in the middle of a line")


def _validate(model: type[M], value: Any) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = first["loc"]
        if first["type"] == UNKNOWN_FIELD:
            path += (first["ctx"]["name"],)
        field = ".".join(str(part) for part in path)
        value = "" if first["type"] in _SAY_ALL else f", not {_shown(first['input'])}"
        raise InvalidRequestError(
            f"{field or 'body'}: {first['msg']}{value}", field=field
        ) from None


def _shown(value: Any) -> str:
    """Describe a wrong value on one line: a scalar by its value, anything else by its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.60}"
    return f"a value of type {type(value).__name__}"


def _load_json(data: bytes | bytearray, max_bytes: int) -> Any:
    if len(data) > max_bytes:
        raise PayloadTooLargeError(f"the body has {len(data)} bytes; the limit is {max_bytes}")
    _check_items(data)
    try:
        return json.loads(data, parse_int=_integer, parse_float=_number)
    except RecursionError as error:
        raise MalformedRequestError(
            f"the body is not valid JSON: nested deeper than {sys.getrecursionlimit()} levels"
        ) from error
    except ValueError as error:
        raise MalformedRequestError(f"the body is not valid JSON: {error}") from error


def _check_items(data: bytes | bytearray) -> None:
    """Refuse JSON with too many values before any of it is parsed.

    Raises:
        PayloadTooLargeError: over `MAX_JSON_ITEMS` items, or `MAX_JSON_CONTAINERS` lists and maps.
    """
    commas = containers = 0
    for start in range(0, len(data), _COUNTED_BYTES):
        piece = data[start : start + _COUNTED_BYTES]
        commas += piece.count(b",")
        containers += piece.count(b"[") + piece.count(b"{")
        if commas + containers > MAX_JSON_ITEMS or containers > MAX_JSON_CONTAINERS:
            raise PayloadTooLargeError(
                f"the body has more than {MAX_JSON_ITEMS} items, or {MAX_JSON_CONTAINERS} lists "
                f"and maps; send arrays as {MSGPACK_MEDIA_TYPE}"
            )


# Written in Python, so that other threads can run between two numbers.
def _integer(text: str) -> int | float:
    return int(text) if len(text) <= _MOST_DIGITS else float(text)


def _number(text: str) -> float:
    return float(text)
