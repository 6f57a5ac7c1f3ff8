"""The body of a request, read under limits of size, time and memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel

from shared import wire
from shared.errors import (
    DeadlineExceededError,
    MalformedRequestError,
    PayloadTooLargeError,
    ProtocolError,
    UnsupportedMediaTypeError,
)
from teacher_server.http.exchange import MEDIA_TYPES, Exchange

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Body:
    """The body as it came, of at most ``limit`` bytes."""

    data: bytearray
    media_type: str
    limit: int

    def load(self, model: type[M]) -> M:
        """Return the body as a validated message; raise as `wire.load` does."""
        return wire.load(model, self.data, self.media_type, max_bytes=self.limit)


async def read_body(
    exchange: Exchange, max_bytes: int, media_types: tuple[str, ...] = MEDIA_TYPES
) -> Body:
    """Read the body of a request, whose bytes are held until the answer is sent.

    Args:
        exchange: the request; its connection is closed after a refusal, the rest being unread.
        max_bytes: of the body, and of JSON at most `wire.MAX_JSON_REQUEST_BYTES`.
        media_types: those that are taken.

    Raises:
        UnsupportedMediaTypeError: another media type or encoding, or an answer that nobody reads.
        PayloadTooLargeError: more than ``max_bytes`` bytes, declared or sent.
        OverloadedError: other requests leave no room for it.
        DeadlineExceededError: it did not arrive in time.
        MalformedRequestError: it is empty.
    """
    media_type = exchange.content_type
    if media_type not in media_types:
        raise UnsupportedMediaTypeError(
            f"Content-Type {media_type!r} is not one of {', '.join(media_types)}"
        )
    encoding = exchange.request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedMediaTypeError(f"Content-Encoding {encoding!r} is not supported")
    exchange.answer_type()  # raises before an answer that the caller cannot read is computed
    limit = max_bytes
    if media_type == wire.JSON_MEDIA_TYPE:
        limit = min(limit, wire.MAX_JSON_REQUEST_BYTES)
    patience = exchange.admission.request_timeout
    try:
        async with asyncio.timeout(patience):
            data = await _read(exchange, media_type, limit)
    except TimeoutError as error:
        exchange.hang_up = True
        raise DeadlineExceededError(f"the body did not arrive in {patience:g} s") from error
    except ProtocolError:
        exchange.hang_up = True
        raise
    if not data:
        raise MalformedRequestError("the body is empty")
    return Body(data, media_type, limit)


async def _read(exchange: Exchange, media_type: str, limit: int) -> bytearray:
    declared = exchange.request.headers.get("content-length", "")
    expected = int(declared) if declared.isdigit() else 0
    if expected > limit:
        raise PayloadTooLargeError(
            f"the body has {expected} bytes; the limit is {limit} in {media_type}"
        )
    exchange.hold(expected)
    data = bytearray()
    async for chunk in exchange.request.stream():
        data += chunk
        if len(data) > limit:
            raise PayloadTooLargeError(f"the body has over {limit} bytes, the limit")
        if len(data) > expected:  # the length was not declared
            exchange.hold(len(data) - expected)
            expected = len(data)
    return data
