"""The body of a response, limited in bytes and in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx

from shared.errors import TeacherAnswerError
from student_trainer.teacher.transport import bounded


class ResponseBody:
    """A response's body as it arrives, limited in bytes and in time.

    httpx's own timeout restarts with each byte, so a slow body might never end.

    Args:
        response: a response of which only the head was read.
        most: largest number of bytes.
        seconds: time until the whole body must have arrived.
        count: called with the number of bytes of each chunk.
    """

    def __init__(
        self, response: httpx.Response, most: int, seconds: float, count: Callable[[int], None]
    ) -> None:
        self._response = response
        self._most = most
        self._seconds = seconds
        self._count = count
        self.extend()

    def extend(self) -> None:
        """Restart the time limit, because a part of the body was complete and useful."""
        self._deadline = time.monotonic() + self._seconds

    def __iter__(self) -> Iterator[bytes]:
        """Yield the chunks as they were sent; nothing is decompressed, so no small body gets large.

        Raises:
            TeacherAnswerError: the body has more bytes than an answer can have.
            httpx.TransportError: the connection broke; `httpx.ReadTimeout` if it took too long.
        """
        size = 0
        chunks = self._response.iter_raw()
        while True:
            with bounded(self._deadline):
                chunk = next(chunks, None)
            if chunk is None:
                return
            size += len(chunk)
            self._count(len(chunk))
            if size > self._most:
                raise TeacherAnswerError(
                    f"{self._response.url} answered more than {self._most} bytes, which is more "
                    "than was requested"
                )
            if time.monotonic() > self._deadline:
                raise httpx.ReadTimeout(f"{size} bytes in {self._seconds:g} s, and no end")
            yield chunk
