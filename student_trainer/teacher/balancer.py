"""The HTTP client of one teacher at several addresses: load balancing, failover and retries."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import ssl
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Literal, TypeVar

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    wait_random_exponential,
)

from shared import logs, wire
from shared.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    ProtocolError,
    TeacherAnswerError,
    TeacherError,
    TeacherUnauthorizedError,
    TeacherUnreachableError,
    UnavailableError,
    error_from_problem,
)
from shared.printable import one_line
from student_trainer.runtime.threads import in_thread
from student_trainer.teacher.deadlines import BoundedTransport, bounded

logger = logging.getLogger(__name__)

R = TypeVar("R")

Unreachable = Literal["wait", "stop"]

_REQUEST_ID = "X-Request-Id"
_CONNECTIONS = 8
_RECHECK_SECONDS = 1.0
_READY_TIMEOUT = 10.0
_CONNECT_TIMEOUT = 10.0
_REMIND_SECONDS = 60.0
# With keep-alive, a connection whose other end vanished fails after a minute, not at the timeout.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_ATTEMPTS_AT_A_500 = 3
_MAX_ANSWER_BYTES = 1 << 30
_MAX_REFUSAL_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 18  # including all 1xx responses before it
_backoff = wait_random_exponential(multiplier=0.25, max=30.0)

# After these errors the same request may succeed later, at the same replica.
_TRANSIENT_ERRORS = (httpx.TransportError, OverloadedError, UnavailableError)
# After these errors the same request may succeed now, at another replica.
FAILOVER_ERRORS = (*_TRANSIENT_ERRORS, InternalError, DeadlineExceededError)


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
                    "than was asked for"
                )
            if time.monotonic() > self._deadline:
                raise httpx.ReadTimeout(f"{size} bytes in {self._seconds:g} s, and no end")
            yield chunk


class Replicas:
    """An HTTP client of one teacher behind one or several addresses; safe in several threads.

    A request goes to the replica with the fewest outstanding tokens. A replica that fails (no
    connection, no answer in time, 429, 5xx) is excluded at once, and the request goes to another.
    A thread checks every second whether an excluded replica is ready; it rejoins if it is and
    ``rejoins`` agrees. If all are excluded, all are tried again until ``timeout``, with exponential
    back-off and full jitter; a 500 is tried again only a few times.

    Args:
        urls: addresses, such as ``http://host:8000``.
        timeout: seconds to wait for an answer, with retries; one attempt gets an equal share of it
            for each replica, so that a replica that hangs leaves time for the others.
        media_type: media type of requests and answers.
        ready: route that answers 200 when the server takes requests.
        rejoins: returns whether a replica that is ready again is the same teacher as the others. A
            `TeacherError` that it raises ends the run: the next request raises it.
        start: the command that starts such a server, for messages.
        api_key: sent with every request, to these addresses only.
        unreachable: behaviour when a request failed and no replica is ready: "wait" until
            ``timeout``, or "stop" at once.

    Raises:
        ConfigurationError: the certificates that SSL_CERT_FILE names cannot be read.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        media_type: str,
        ready: str,
        rejoins: Callable[[str], bool],
        start: str,
        api_key: str | None,
        unreachable: Unreachable = "wait",
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout = timeout
        self._ready = ready
        self._rejoins = rejoins
        self._start = start
        self._unreachable = unreachable
        self._media_types = (media_type, wire.STREAM_MEDIA_TYPES[media_type])
        self._share = timeout / len(self.urls)
        # Running calls of each replica; each function returns the tokens that its call waits for.
        self._outstanding: dict[str, list[Callable[[], int]]] = {url: [] for url in self.urls}
        self._excluded: set[str] = set()
        self._fatal: TeacherError | None = None
        self._bytes_received = 0
        self._tokens_scored = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        # A server without keys distinguishes clients behind one address by X-Client-Id.
        headers = {
            "Accept": media_type,
            "Accept-Encoding": "identity",
            "Content-Type": media_type,
            "X-Client-Id": f"{socket.gethostname()}-{os.getpid()}",
        }
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            self._http = httpx.Client(
                headers=headers, cookies=_no_cookies(), transport=_transport()
            )
        except OSError as error:  # includes ssl.SSLError
            raise ConfigurationError(
                f"SSL_CERT_FILE {os.environ.get('SSL_CERT_FILE')}: {error.strerror or error}; give "
                "a PEM file of the certificates to trust"
            ) from error
        self._slots = threading.Semaphore(_CONNECTIONS)
        self._turn = 0

    def close(self) -> None:
        """Close the client; requests in flight fail."""
        self._closed.set()
        self._http.close()

    def submit(self, work: Callable[..., R], *arguments: Any, **options: Any) -> Future[R]:
        """Run ``work`` in a thread, as many at once as there are connections."""

        def run() -> R:
            with self._slots:
                return work(*arguments, **options)

        return in_thread(run, name="teacher")

    def count_scored(self, tokens: int) -> None:
        with self._lock:
            self._tokens_scored += tokens

    def take_traffic(self) -> tuple[int, int]:
        """Return (bytes received, completion tokens scored) since the last call."""
        with self._lock:
            taken = self._bytes_received, self._tokens_scored
            self._bytes_received = self._tokens_scored = 0
        return taken

    def wait_until_ready(self) -> None:
        """Wait until every replica is ready, and log a message every few seconds.

        Raises:
            TeacherAnswerError: something other than a teacher listens there.
            TeacherUnauthorizedError: a gateway before it requires a key, or another one.
            TeacherUnreachableError: a replica is not ready within ``timeout`` seconds, or its
                certificate is not trusted.
        """
        deadline = time.monotonic() + self.timeout
        for url in self.urls:
            self._wait_for(url, deadline)

    def switched_off(self) -> bool:
        """Return whether nothing listens at any address; a server that loads its model listens.

        Raises:
            TeacherUnreachableError: a certificate is not trusted.
        """
        nobody = (httpx.ConnectError, httpx.ConnectTimeout)
        return all(isinstance(self._get_readiness(url), nobody) for url in self.urls)

    def request(
        self,
        url: str,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        most: int = _MAX_ANSWER_BYTES,
    ) -> bytes:
        """Send a request to one replica once, and return the body of at most ``most`` bytes.

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
        """Send a request to one replica once, and give the body of its answer as it arrives.

        Raises:
            TeacherUnauthorizedError: the replica requires a key, or another one.
            TeacherUnreachableError: its certificate is not trusted.
            TeacherAnswerError: it redirects, or answers with another media type.
            ProtocolError: the error that any other status stands for.
            DeadlineExceededError: no answer within a share of ``timeout``, though it is ready.
            httpx.TransportError: no answer, or a broken one; `call` tries another replica.
        """
        try:
            with self._open_response(method, url + path, self._share, body) as response:
                if response.status_code != 200:
                    _check_redirect(url, response)
                    _check_authorized(url, response)
                    raise self._refusal(url, response)
                self._check_media_type(url + path, response)
                yield ResponseBody(response, most, self._share, self._count_bytes)
        except httpx.ReadTimeout as error:
            if self._why_not_ready(url):
                raise
            # Treated like the server's own 504, which comes too late if its deadline is later.
            raise DeadlineExceededError(
                f"{url} is ready, but has not answered in {self._share:g} s "
                f"({error}{_to_request()})"
            ) from error
        except httpx.ConnectError as error:
            _check_trust(url, error)
            raise

    @contextlib.contextmanager
    def _open_response(
        self, method: str, url: str, seconds: float, body: bytes | None = None
    ) -> Iterator[httpx.Response]:
        """Send a request, and give the response once its whole head came within ``seconds``.

        Raises:
            httpx.TransportError: no answer; `httpx.ReadTimeout` if the head took too long.
        """
        timeout = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_TIMEOUT))
        request_id = logs.bound_field("request_id")
        headers = {} if request_id is None else {_REQUEST_ID: request_id}
        request = self._http.build_request(
            method, url, content=body, headers=headers, timeout=timeout
        )
        until = time.monotonic() + seconds

        def send() -> httpx.Response:
            with bounded(until, _MAX_HEAD_BYTES):
                return self._http.send(request, stream=True)

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

    def _check_media_type(self, where: str, response: httpx.Response) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        kind = one_line(response.headers.get("Content-Type", self._media_types[0]), 100)
        if encoding != "identity" or kind.split(";")[0].strip().lower() not in self._media_types:
            raise TeacherAnswerError(
                f"{where} answered {kind} (Content-Encoding: {one_line(encoding, 100)}); asked for "
                f"was plain {self._media_types[0]}. Check what stands between: a gateway, or its "
                "login page"
            )

    def _refusal(self, url: str, response: httpx.Response) -> ProtocolError:
        body = ResponseBody(response, _MAX_REFUSAL_BYTES, self._share, self._count_bytes)
        try:
            content = b"".join(body)
        except TeacherAnswerError:  # too long for a problem document; the status is enough
            content = b""
        return _refusal(url, response, content)

    def _count_bytes(self, count: int) -> None:
        with self._lock:
            self._bytes_received += count

    def call_ready_replica(self, url: str, call: Callable[[str], R]) -> R:
        """Return ``call(url)`` of a replica that was ready a moment ago.

        Raises:
            TeacherUnreachableError: the replica does not answer any more.
        """
        try:
            return call(url)
        except (*_TRANSIENT_ERRORS, DeadlineExceededError) as error:
            raise TeacherUnreachableError(
                f"the teacher at {url} was ready and does not answer now: {error}"
            ) from error

    def call(self, call: Callable[[str], R], left: Callable[[], int]) -> R:
        """Return ``call(url)`` of a replica, or of another one if it fails, until ``timeout``.

        All attempts carry one request id, which the servers and this client log.

        Args:
            left: returns the tokens whose answer is outstanding; called from any thread.

        Raises:
            TeacherUnreachableError: no answer within ``timeout`` seconds, or the client is closed.
            TeacherError: a replica came back as another teacher.
            Whatever else ``call`` raises.
        """
        retrying = Retrying(
            retry=retry_if_exception_type((*_TRANSIENT_ERRORS, InternalError)),
            stop=self._gives_up,
            wait=self._pause,
            before_sleep=self._log_retry,
            reraise=True,
        )
        request_id = uuid.uuid4().hex
        try:
            with logs.bound(request_id=request_id):
                return retrying(self._try_each, call, left, itertools.count(1))
        except _TRANSIENT_ERRORS as error:
            if self._unreachable == "stop":
                tried, remedy = "", "give --teacher_unreachable wait"
            else:
                tried, remedy = f" within {self.timeout:g} s", "raise --teacher_timeout"
            raise TeacherUnreachableError(
                f"no answer from {', '.join(self.urls)}{tried}: {error}. Check that "
                f"`{self._start}` runs there, and its log of request {request_id}, or {remedy}"
            ) from error

    def _gives_up(self, state: RetryCallState) -> bool:
        """Return whether to stop retrying: time is up, a 500 repeats, or nothing is waited for."""
        if (state.seconds_since_start or 0.0) >= self.timeout:
            return True
        if isinstance(state.outcome and state.outcome.exception(), InternalError):
            return state.attempt_number >= _ATTEMPTS_AT_A_500
        return self._unreachable == "stop" and all(map(self._why_not_ready, self.urls))

    def _pause(self, state: RetryCallState) -> float:
        """Return the seconds to the next attempt, never past ``timeout``, despite a Retry-After."""
        error = state.outcome.exception() if state.outcome else None
        retry_after = error.retry_after if isinstance(error, ProtocolError) else None
        left = self.timeout - (state.seconds_since_start or 0.0)
        return max(0.0, min(left, max(retry_after or 0.0, _backoff(state))))

    def _log_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        logger.warning(
            "Teacher call failed at %s (%s); next try in %.1f s, %.0f s left",
            ", ".join(self.urls), error, pause, self.timeout - (state.seconds_since_start or 0.0),
        )  # fmt: skip

    def _try_each(
        self, call: Callable[[str], R], left: Callable[[], int], attempts: Iterator[int]
    ) -> R:
        """Return the first answer of the replicas that are not excluded, each tried once."""
        tried: set[str] = set()
        while True:
            url = self._acquire(left, tried)
            tried.add(url)
            logs.bind(attempt=next(attempts))
            try:
                return call(url)
            except FAILOVER_ERRORS as error:
                if not self._exclude(url, error, tried):
                    raise
            finally:
                with self._lock:
                    self._outstanding[url].remove(left)

    def _acquire(self, left: Callable[[], int], tried: set[str]) -> str:
        if self._closed.is_set():
            raise TeacherUnreachableError("the client is closed")
        with self._lock:
            if self._fatal is not None:
                raise self._fatal
            up = [url for url in self.urls if url not in self._excluded | tried]
            candidates = up or self.urls
            turn = self._turn % len(candidates)  # equally busy replicas take turns
            in_turn = candidates[turn:] + candidates[:turn]
            url = min(in_turn, key=self._tokens_left)
            self._turn += 1
            self._outstanding[url].append(left)
        return url

    def _tokens_left(self, url: str) -> int:
        return sum(left() for left in self._outstanding[url])

    def _exclude(self, url: str, error: Exception, tried: set[str]) -> bool:
        """Exclude ``url`` until it is ready again; return whether another may be tried now."""
        if len(self.urls) == 1:
            return False
        with self._lock:
            news = url not in self._excluded
            self._excluded.add(url)
            up = len(self.urls) - len(self._excluded)
            another = any(other not in self._excluded | tried for other in self.urls)
        if news:
            logger.warning("The teacher at %s is left out (%s); %d go on", url, error, up)
            retry_after = error.retry_after if isinstance(error, ProtocolError) else None
            pause = min(retry_after or 0.0, self.timeout)
            name = f"teacher-back-{url}"
            threading.Thread(target=self._watch, args=(url, pause), name=name, daemon=True).start()
        return another

    def _watch(self, url: str, pause: float) -> None:
        """Wait ``pause`` seconds, then until ``url`` is ready, and let it rejoin.

        Another teacher there ends the run, and so does another key. Other answers, such as a
        gateway's page while the server behind it restarts, are checked again later.
        """
        self._closed.wait(pause)
        while not self._closed.wait(_RECHECK_SECONDS):
            try:
                if self._why_not_ready(url) or not self._rejoins(url):
                    continue
            except (httpx.TransportError, ProtocolError, TeacherAnswerError):
                continue
            except TeacherError as error:
                with self._lock:
                    self._fatal = error
                return
            except RuntimeError:  # httpx raises it if the client was closed meanwhile
                if self._closed.is_set():
                    return
                raise
            with self._lock:
                self._excluded.discard(url)
            logger.warning("The teacher at %s is back", url)
            return

    def _get_readiness(self, url: str) -> httpx.Response | httpx.TransportError:
        """Return the replica's answer to the ready route, or the error that prevented it."""
        try:
            with self._open_response("GET", url + self._ready, _READY_TIMEOUT) as response:
                return response
        except httpx.TransportError as error:
            _check_trust(url, error)
            return error

    def _why_not_ready(self, url: str) -> str:
        """Return why the replica does not take requests, or an empty text if it does.

        Raises:
            TeacherAnswerError, TeacherUnauthorizedError, TeacherUnreachableError: waiting is of no
                use.
        """
        response = self._get_readiness(url)
        if isinstance(response, httpx.TransportError):
            return f"is not reachable ({response})"
        _check_redirect(url, response)
        _check_authorized(url, response)
        if response.status_code == 200:
            return ""
        if response.status_code == 404:
            raise TeacherAnswerError(
                f"{url}{self._ready} is not found there: give the address alone, such as "
                "http://host:8000, without a path, and check what listens at that port"
            )
        return f"answers {response.status_code} to {self._ready}"

    def _wait_for(self, url: str, deadline: float) -> None:
        announced = 0.0
        while problem := self._why_not_ready(url):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TeacherUnreachableError(
                    f"the teacher at {url} {problem} after {self.timeout:g} s. Start it with "
                    f"`{self._start}`, check --teacher_url, or raise --teacher_timeout"
                )
            if time.monotonic() - announced >= 5.0:
                announced = time.monotonic()
                logger.warning(
                    "Waiting for the teacher at %s: it %s; %.0f s left", url, problem, left
                )
            time.sleep(min(0.5, left))


def _check_authorized(url: str, response: httpx.Response) -> None:
    """Refuse a status of 401 or 403, because a repeated request gets the same answer.

    Raises:
        TeacherUnauthorizedError: names the ways to give a key.
    """
    if response.status_code not in (401, 403):
        return
    sent = "Authorization" in response.request.headers
    raise TeacherUnauthorizedError(
        f"{url} answers {response.status_code}: it does not take "
        f"{'the key that was sent' if sent else 'requests without a key'}. Give its key by the "
        "environment variable TEACHER_API_KEY or by --teacher_api_key_file"
    )


def _check_redirect(url: str, response: httpx.Response) -> None:
    """Refuse redirects, because keys and prompts go only to the given addresses.

    Raises:
        TeacherAnswerError: names where it redirects.
    """
    if response.is_redirect:
        raise TeacherAnswerError(
            f"{url} answers {response.status_code} and points to "
            f"{one_line(response.headers['Location'], 200)}: give the teacher's own address as "
            "--teacher_url"
        )


def _check_trust(url: str, error: httpx.TransportError) -> None:
    """Refuse a certificate that no known authority signed.

    Raises:
        TeacherUnreachableError: names the way to trust it.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        raise TeacherUnreachableError(
            f"the certificate of {url} is not trusted: {error}. Name the certificate of "
            "its authority by the environment variable SSL_CERT_FILE"
        ) from error


def _no_cookies() -> CookieJar:
    """Return a jar that keeps no cookies, because answers must not depend on earlier ones."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


def _transport() -> httpx.HTTPTransport | None:
    """Return a transport with TCP keep-alive; None, httpx's own, if a proxy is configured."""
    if set(urllib.request.getproxies()) - {"no"}:
        return None
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return BoundedTransport(options)


def _close_answer(sending: Future[httpx.Response]) -> None:
    if sending.exception() is None:
        sending.result().close()


def _refusal(url: str, response: httpx.Response, content: bytes) -> ProtocolError:
    """Return the error that a problem document or OpenAI's error body stands for."""
    try:
        problem = json.loads(content)
    except (ValueError, RecursionError):
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    error = problem.get("error")
    if isinstance(error, dict):
        problem = {"detail": error.get("message"), "field": error.get("param")}
    retry_after = _seconds(response.headers.get("Retry-After", ""))
    answered = f"{url} answered {response.status_code}{_to_request()}"
    # A gateway's 5xx without a problem document is temporary, except 504: the request took long.
    if response.status_code >= 500 and response.status_code != 504 and not problem:
        return UnavailableError(answered, retry_after=retry_after)
    detail = problem.get("detail")
    problem["detail"] = f"{detail} ({answered})" if detail else answered
    return error_from_problem(response.status_code, problem, retry_after=retry_after)


def _to_request() -> str:
    """Return the end of a message that names the request's id, if it has one."""
    request_id = logs.bound_field("request_id")
    return "" if request_id is None else f" to request {request_id}"


def _seconds(retry_after: str) -> float | None:
    """Return the seconds of a Retry-After, a number or a date; None if it is neither."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))
    with contextlib.suppress(ValueError):
        date = parsedate_to_datetime(retry_after)
        return max(
            0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        )
    return None
