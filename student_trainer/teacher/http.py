"""The HTTP client that makes one attempt at one address, within limits of time and size."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import httpx

from shared import logs, wire
from shared.errors import ConfigurationError, DeadlineExceededError, TeacherAnswerError
from student_trainer.runtime.threads import in_thread
from student_trainer.teacher.body import ResponseBody
from student_trainer.teacher.refusals import (
    check_authorized,
    check_media_type,
    check_redirect,
    check_trust,
    refusal,
    to_request,
)
from student_trainer.teacher.traffic import Traffic
from student_trainer.teacher.transport import bounded, direct_transport

logger = logging.getLogger(__name__)

_REQUEST_ID = "X-Request-Id"
_READY_TIMEOUT = 10.0
_CONNECT_TIMEOUT = 10.0
_REMIND_SECONDS = 60.0
_MAX_ANSWER_BYTES = 1 << 30
_MAX_REFUSAL_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 18  # including all 1xx responses before it


@dataclass(frozen=True)
class ServerKind:
    """The kind of server that listens at an address.

    Attributes:
        media_type: media type of requests and answers.
        ready: route that answers 200 when the server takes requests.
        start: the command that starts such a server, for messages.
    """

    media_type: str
    ready: str
    start: str


class HttpClient:
    """An HTTP client of servers of one kind; safe in several threads.

    Args:
        server: the kind of server.
        seconds: time for the head of an answer, and again for its body.
        api_key: sent with every request.
        traffic: counts the bytes of all bodies.

    Raises:
        ConfigurationError: the certificates that SSL_CERT_FILE names cannot be read.
    """

    def __init__(
        self,
        server: ServerKind,
        *,
        seconds: float,
        api_key: str | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self._server = server
        self._seconds = seconds
        self._traffic = traffic or Traffic()
        # A server without keys distinguishes clients behind one address by X-Client-Id.
        headers = {
            "Accept": server.media_type,
            "Accept-Encoding": "identity",
            "Content-Type": server.media_type,
            "X-Client-Id": f"{socket.gethostname()}-{os.getpid()}",
        }
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            self._client = httpx.Client(
                headers=headers, cookies=_no_cookies(), transport=direct_transport()
            )
        except OSError as error:  # includes ssl.SSLError
            raise ConfigurationError(
                f"SSL_CERT_FILE {os.environ.get('SSL_CERT_FILE')}: {error.strerror or error}; give "
                "a PEM file of the certificates to trust"
            ) from error

    def close(self) -> None:
        """Close the connections; requests in flight fail."""
        self._client.close()

    def request(
        self,
        url: str,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        most: int = _MAX_ANSWER_BYTES,
    ) -> bytes:
        """Send a request once, and return the body of at most ``most`` bytes.

        Raises: as `stream`.
        """
        with self.stream(url, method, path, body, most=most) as chunks:
            return b"".join(chunks)

    @contextlib.contextmanager
    def stream(
        self,
        url: str,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        most: int = _MAX_ANSWER_BYTES,
    ) -> Iterator[ResponseBody]:
        """Send a request once, and give the body of its answer as it arrives.

        Raises:
            TeacherUnauthorizedError: the server requires a key, or another one.
            TeacherUnreachableError: its certificate is not trusted.
            TeacherAnswerError: it redirects, or answers with another media type.
            ProtocolError: the error that any other status stands for.
            DeadlineExceededError: no answer in time, though the server is ready.
            httpx.TransportError: no answer, or a broken one.
        """
        try:
            with self.open(method, url + path, body) as response:
                if response.status_code != 200:
                    check_redirect(url, response)
                    check_authorized(url, response)
                    raise refusal(url, response, self._read_refusal(response))
                media_type = self._server.media_type
                accepted = (media_type, wire.STREAM_MEDIA_TYPES[media_type])
                check_media_type(url + path, response, accepted)
                yield self.body(response, most)
        except httpx.ReadTimeout as error:
            if self.why_not_ready(url):
                raise
            # Treated like the server's own 504, which comes too late if its deadline is later.
            raise DeadlineExceededError(
                f"{url} is ready, but has not answered in {self._seconds:g} s "
                f"({error}{to_request()})"
            ) from error
        except httpx.ConnectError as error:
            check_trust(url, error)
            raise

    @contextlib.contextmanager
    def open(
        self, method: str, url: str, body: bytes | None = None, *, seconds: float | None = None
    ) -> Iterator[httpx.Response]:
        """Send a request, and give the response, whatever its status, once its whole head came.

        Args:
            seconds: time for the head, if it is not this client's own.

        Raises:
            httpx.TransportError: no answer; `httpx.ReadTimeout` if the head took too long.
        """
        seconds = self._seconds if seconds is None else seconds
        timeout = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_TIMEOUT))
        request_id = logs.bound_field("request_id")
        headers = {} if request_id is None else {_REQUEST_ID: request_id}
        request = self._client.build_request(
            method, url, content=body, headers=headers, timeout=timeout
        )
        until = time.monotonic() + seconds

        def send() -> httpx.Response:
            with bounded(until, _MAX_HEAD_BYTES):
                return self._client.send(request, stream=True)

        sending = in_thread(send, name="teacher")
        waited = 0.0
        while seconds - waited > _REMIND_SECONDS and wait([sending], _REMIND_SECONDS).not_done:
            waited += _REMIND_SECONDS
            logger.warning(
                "%s has not answered for %.0f s; %.0f s left", url, waited, seconds - waited
            )
        try:
            response = sending.result(seconds - waited)
        except TimeoutError as error:  # through a proxy `bounded` has no effect: the thread goes on
            sending.add_done_callback(_close_answer)
            raise httpx.ReadTimeout(f"no head of an answer in {seconds:g} s") from error
        with contextlib.closing(response):
            yield response

    def body(self, response: httpx.Response, most: int) -> ResponseBody:
        """Return the body, of at most ``most`` bytes, of a response that `open` gave."""
        return ResponseBody(response, most, self._seconds, self._traffic.count_bytes)

    def _read_refusal(self, response: httpx.Response) -> bytes:
        try:
            return b"".join(self.body(response, _MAX_REFUSAL_BYTES))
        except TeacherAnswerError:  # too long for a problem document; the status is enough
            return b""

    def why_not_ready(self, url: str) -> str:
        """Return why a server does not take requests, or an empty text if it does.

        Raises:
            TeacherAnswerError, TeacherUnauthorizedError, TeacherUnreachableError: waiting is of no
                use.
        """
        response = self._get_readiness(url)
        if isinstance(response, httpx.TransportError):
            return f"is not reachable{_nothing_listens(url, response)} ({response})"
        check_redirect(url, response)
        check_authorized(url, response)
        if response.status_code == 200:
            return ""
        ready = self._server.ready
        if response.status_code == 404:
            raise TeacherAnswerError(
                f"{url}{ready} is not found there: give the address alone, "
                f"{_without_path(url)}, and check what listens at that port"
            )
        loads = ", as while it loads its model" if response.status_code == 503 else ""
        return f"answers {response.status_code} to {ready}{loads}"

    def listens(self, url: str) -> bool:
        """Return whether anything listens there; a server that loads its model does.

        Raises:
            TeacherUnreachableError: its certificate is not trusted.
        """
        nobody = (httpx.ConnectError, httpx.ConnectTimeout)
        return not isinstance(self._get_readiness(url), nobody)

    def _get_readiness(self, url: str) -> httpx.Response | httpx.TransportError:
        """Return the answer to the ready route, or the error that prevented it."""
        try:
            with self.open("GET", url + self._server.ready, seconds=_READY_TIMEOUT) as response:
                return response
        except httpx.TransportError as error:
            check_trust(url, error)
            return error


def _no_cookies() -> CookieJar:
    """Return a jar that keeps no cookies, because answers must not depend on earlier ones."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


def _nothing_listens(url: str, error: httpx.TransportError) -> str:
    """Return that nothing listens, where the other machine said so; else an empty text."""
    if "refused" not in str(error):
        return ""
    parts = urlsplit(url)
    if parts.port is not None:
        return f": nothing listens at port {parts.port}"
    port = 443 if parts.scheme == "https" else 80
    return f": nothing listens at port {port}, and the address names no other"


def _without_path(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _close_answer(sending: Future[httpx.Response]) -> None:
    if sending.exception() is None:
        sending.result().close()
