"""The messages of sparse-gkd's own protocol as a client sends and reads them, and their sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from shared import wire
from shared.errors import (
    InvalidRequestError,
    MalformedRequestError,
    PayloadTooLargeError,
    TeacherAnswerError,
)
from shared.printable import one_line
from shared.protocol import (
    PROTOCOL_VERSION,
    GenerateEnd,
    GenerateEvent,
    InfoResponse,
    Limits,
)
from student_trainer.teacher.base import check_info
from student_trainer.teacher.http import HttpClient

M = TypeVar("M", bound=BaseModel)

MAX_BYTES_BESIDE_ARRAYS = 1 << 16  # for an answer, and again for each sequence in it
_MAX_ANSWER_BYTES = 1 << 30


def request_message(
    http: HttpClient,
    method: str,
    url: str,
    path: str,
    answer: type[M],
    body: bytes | None = None,
    *,
    most: int = _MAX_ANSWER_BYTES,
) -> M:
    """Send a request to one replica once, and return its answer of at most ``most`` bytes.

    Raises: as `HttpClient.stream`; `TeacherAnswerError` for an answer that cannot be decoded.
    """
    content = http.request(url, method, path, body, most=most)
    with _as_answer_errors(url + path):
        return wire.load(answer, content, wire.MSGPACK_MEDIA_TYPE, max_bytes=most)


def request_info(http: HttpClient, url: str) -> InfoResponse:
    """Return one replica's description of the teacher.

    Raises: as `request_message`; `TeacherAnswerError` for another version of the protocol.
    """
    info = request_message(http, "GET", url, "/v1/info", InfoResponse)
    if info.protocol_version != PROTOCOL_VERSION:
        raise TeacherAnswerError(
            f"{url} speaks protocol version {info.protocol_version}, this trainer "
            f"{PROTOCOL_VERSION}: install the same release of sparse-gkd on both sides"
        )
    check_info(url, info)
    return info


def request_limits(limits: Limits, envelope: BaseModel) -> tuple[int, int, int, int]:
    """Return the sequences, tokens, log-probs and bytes that fit a request beside other fields."""
    list_header = 4  # a full list's header is longer by this than that of the empty one
    body = limits.max_body_bytes - body_bytes(envelope) - list_header
    return limits.max_sequences, limits.max_tokens, limits.max_logprobs, body


def body_bytes(message: BaseModel) -> int:
    """Return the bytes of a message in a request's body."""
    return len(wire.dump(message, wire.MSGPACK_MEDIA_TYPE))


def max_answer_bytes(cost: tuple[int, ...]) -> int:
    """Return the most bytes in the answer to one sequence: an id and a float32 per log-prob."""
    _, tokens, logprobs, _ = cost
    return MAX_BYTES_BESIDE_ARRAYS + 8 * (tokens + logprobs)


def requested_width(requested: NDArray[np.uint32] | None) -> int:
    """Return the number of requested ids at each position, m of [T, m]."""
    return 0 if requested is None else requested.shape[1]


def stream_messages(where: str, chunks: Iterable[bytes]) -> Iterator[GenerateEvent | GenerateEnd]:
    """Yield the messages of a streamed answer as their bytes arrive.

    Args:
        where: address and path, for messages.

    Raises:
        TeacherAnswerError: what arrived is no such message.
        Whatever reading ``chunks`` raises.
    """
    # As this is a generator, errors of its consumer are not raised within the block.
    with _as_answer_errors(where):
        yield from wire.stream_messages(
            chunks, wire.MSGPACK_STREAM_MEDIA_TYPE, max_bytes=_MAX_ANSWER_BYTES
        )


@contextlib.contextmanager
def _as_answer_errors(where: str) -> Iterator[None]:
    """Raise `TeacherAnswerError` for an answer that cannot be decoded in the block."""
    try:
        yield
    except (MalformedRequestError, InvalidRequestError, PayloadTooLargeError) as error:
        text = one_line(str(error))
        raise TeacherAnswerError(f"{where} answered something else: {text}") from error
