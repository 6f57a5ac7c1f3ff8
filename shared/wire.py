"""Messages <-> bytes, in either media type."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from shared import codec
from shared.errors import InvalidRequestError, MalformedRequestError, PayloadTooLargeError

JSON_MEDIA_TYPE = "application/json"
MSGPACK_MEDIA_TYPE = codec.MEDIA_TYPE

# Parsed JSON takes up to 30 times its text; JSON is for people, arrays go in msgpack.
MAX_JSON_ITEMS = 1 << 22

M = TypeVar("M", bound=BaseModel)


def dump(message: BaseModel, media_type: str) -> bytes:
    """The message in ``media_type``, which is one of the two above."""
    if media_type == MSGPACK_MEDIA_TYPE:
        return codec.encode(message.model_dump())
    return message.model_dump_json().encode()


def load(model: type[M], data: bytes, media_type: str, *, max_bytes: int) -> M:
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
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"{field or 'body'}: {first['msg']}", field=field) from None


def _load_json(data: bytes, max_bytes: int) -> Any:
    if len(data) > max_bytes:
        raise PayloadTooLargeError(f"the body has {len(data)} bytes; the limit is {max_bytes}")
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_ITEMS:
        raise PayloadTooLargeError(
            f"the body has more than {MAX_JSON_ITEMS} items; send arrays as {MSGPACK_MEDIA_TYPE}"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"the body is not valid JSON: {error}") from error
