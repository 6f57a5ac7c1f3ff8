"""The answers of the server: whole or in a stream, and errors as documents."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Callable
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from shared import wire
from shared.errors import InternalError, InvalidRequestError, ProtocolError, UnauthorizedError
from shared.protocol import Problem
from teacher_server.http.exchange import Exchange
from teacher_server.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
CLIENT_GONE = 499  # the status in metrics and the log of a request whose caller left
# A limit, since pydantic lets no other thread run while it writes an array as JSON.
MAX_JSON_ARRAYS = 4 << 20
_PIECE_BYTES = 64 << 10
# Bytes in memory for each byte of an answer's arrays: msgpack packs a copy, JSON makes Python
# numbers and then text.
_COPIES = {wire.MSGPACK_MEDIA_TYPE: 2, wire.JSON_MEDIA_TYPE: 16}


class Reply(Response):
    """An answer that is whole before it is sent.

    Attributes:
        patience: seconds that the caller has to take a piece of it.
        ended: called with the status, when all is sent or the caller is gone.
    """

    patience = math.inf
    ended: Callable[[int], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, _in_pieces(send, self.patience))
        except TimeoutError:
            _warn_of_a_stuck_caller(self.patience)
        finally:
            self.ended(self.status_code)


class Stream(StreamingResponse):
    """An answer whose items are sent as they come.

    Attributes:
        outcome: the status that the answer would have, were its end known at its beginning.
        patience, ended: as of `Reply`, with the outcome as status.
    """

    body_iterator: AsyncGenerator[bytes, None]
    patience = math.inf
    ended: Callable[[int], None]

    def __init__(self, items: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(items, media_type=media_type)
        self.outcome = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The items already watch for a caller who leaves, so starlette must not do it again.
        try:
            await self.stream_response(_in_pieces(send, self.patience))
        except TimeoutError:
            self.outcome = CLIENT_GONE
            _warn_of_a_stuck_caller(self.patience)
        finally:
            await self.body_iterator.aclose()
            self.ended(self.outcome)


Answer = Reply | Stream
Refusal = Callable[[ProtocolError, str], Reply]


def _in_pieces(send: Send, patience: float) -> Send:
    """Return a ``send`` that waits for a slow reader after every piece, and buffers no whole.

    Raises:
        TimeoutError: nothing was taken for ``patience`` seconds.
    """

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        for start in range(0, max(1, len(body)), _PIECE_BYTES):
            piece, end = message, start + _PIECE_BYTES
            if end < len(body) or start:
                more = end < len(body) or message.get("more_body", False)
                piece = {**message, "body": bytes(body[start:end]), "more_body": more}
            async with asyncio.timeout(patience):
                await send(piece)

    return send_pieces


def _warn_of_a_stuck_caller(patience: float) -> None:
    logger.warning("A caller has taken nothing for %g s; hanging up", patience)


def hold_answer(exchange: Exchange, array_bytes: int, field: str) -> None:
    """Hold the memory of an answer while it is made and sent.

    Args:
        exchange: the request.
        array_bytes: bytes of the answer's arrays, in float32.
        field: the part of the request that lists its items.

    Raises:
        InvalidRequestError: too large an answer for JSON.
        PayloadTooLargeError: the server never holds so much.
        OverloadedError: there is no room for it now.
    """
    media_type = exchange.answer_type()
    if media_type == wire.JSON_MEDIA_TYPE and array_bytes > MAX_JSON_ARRAYS:
        raise InvalidRequestError(
            f"an answer of {array_bytes} bytes of arrays; the limit in JSON is {MAX_JSON_ARRAYS}. "
            f"Split the request, or ask for {wire.MSGPACK_MEDIA_TYPE} by Accept",
            field=field,
        )
    exchange.hold(array_bytes * _COPIES[media_type], field)


async def message_reply(exchange: Exchange, message: BaseModel) -> Reply:
    """Return a message in the media type that the caller takes; it is written in a thread."""
    media_type = exchange.answer_type()
    body = await exchange.in_pool(exchange.held.bytes, wire.dump, message, media_type)
    return Reply(body, media_type=media_type)


def json_reply(value: Any) -> Reply:
    """Return a small value as JSON."""
    return Reply(json.dumps(value), media_type=wire.JSON_MEDIA_TYPE)


def as_protocol_error(error: Exception, request_id: str, metrics: Metrics) -> ProtocolError:
    """Return the error that the caller sees for ``error``; the log keeps the rest."""
    if not isinstance(error, ProtocolError):
        logger.error("Request %s failed", request_id, exc_info=error)
        return InternalError(f"internal error; the log of request {request_id} says more")
    metrics.rejected.labels(error.slug()).inc()
    return error


def problem_of(error: ProtocolError, request_id: str) -> Problem:
    """Return an error as an RFC 9457 problem."""
    return Problem.model_validate(error.to_problem(request_id))


def problem_reply(error: ProtocolError, request_id: str) -> Reply:
    """Return an error as a problem document."""
    body = problem_of(error, request_id).model_dump_json(exclude_none=True).encode()
    return _refused(error, request_id, body, "application/problem+json")


def openai_error_reply(error: ProtocolError, request_id: str) -> Reply:
    """Return an error as OpenAI's error object."""
    shown = {
        "message": error.detail,
        "type": error.slug(),
        "param": error.field,
        "code": error.status,
    }
    body = json.dumps({"error": shown}).encode()
    return _refused(error, request_id, body, wire.JSON_MEDIA_TYPE)


def _refused(error: ProtocolError, request_id: str, body: bytes, media_type: str) -> Reply:
    headers = {REQUEST_ID: request_id}
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = f"{max(1, round(error.retry_after))}"
    return Reply(body, status_code=error.status, media_type=media_type, headers=headers)
