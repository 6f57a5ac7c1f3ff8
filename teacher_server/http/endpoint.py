"""The wrapper of every route: request id, key, metrics, a log line, and errors as answers."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from shared import logs
from shared.errors import MethodNotAllowedError, NotFoundError, UnauthorizedError
from teacher_server.http.exchange import Exchange
from teacher_server.http.replies import (
    CLIENT_GONE,
    REQUEST_ID,
    Answer,
    Refusal,
    Reply,
    as_protocol_error,
    problem_reply,
)
from teacher_server.limits.admission import Admission, ClientGoneError
from teacher_server.limits.pool import FairPool
from teacher_server.metrics import Metrics
from teacher_server.throughput import Throughput

logger = logging.getLogger(__name__)

_CLIENT_ID = "X-Client-Id"
_LONGEST_CLIENT_ID = _LONGEST_REQUEST_ID = 64

Handler = Callable[[Exchange], Awaitable[Answer]]


@dataclass(frozen=True)
class EndpointWrapper:
    """The part of the application that every request passes, whatever its route.

    Attributes:
        check_key: takes the header Authorization and returns the client, empty where the server
            has no keys; raises `UnauthorizedError`.
        admission, pool: for the `Exchange` of each request.
        metrics: counts requests and refusals.
        throughput: is told of each request, for the line of each minute.
        log_requests: True for a line about each request; else only those that failed by the
            server's own fault (5xx) have one.
    """

    check_key: Callable[[str | None], str]
    admission: Admission
    pool: FairPool
    metrics: Metrics
    throughput: Throughput
    log_requests: bool = False

    def wrap(
        self,
        path: str,
        handler: Handler,
        *,
        refusal: Refusal = problem_reply,
        needs_key: bool = True,
        log_level: int = logging.INFO,
    ) -> Callable[[Request], Awaitable[Answer]]:
        """Return ``handler`` with all that surrounds it.

        Args:
            path: of the route.
            handler: answers a request.
            refusal: makes an answer of an error.
            needs_key: False where everyone may ask.
            log_level: of the line about each request, if there is one.
        """

        async def endpoint(request: Request) -> Answer:
            exchange, ended = self._begin(request, path, log_level)
            try:
                if needs_key:
                    self._identify(exchange)
                answer = await handler(exchange)
                answer.headers[REQUEST_ID] = exchange.request_id
            except (ClientGoneError, ClientDisconnect):
                answer = Reply(status_code=CLIENT_GONE)
            except Exception as error:
                known = as_protocol_error(error, exchange.request_id, self.metrics)
                answer = refusal(known, exchange.request_id)
            if exchange.hang_up:
                # An open connection would go on to receive a body that nobody reads.
                answer.headers["Connection"] = "close"
            answer.ended = ended
            answer.patience = self.admission.request_timeout
            return answer

        return endpoint

    async def unknown_route(self, request: Request, error: Exception) -> Answer:
        """Return the answer to an unknown path (404) or method (405)."""
        assert isinstance(error, HTTPException)
        exchange, ended = self._begin(request, "other", logging.INFO)
        detail = f"{request.method} {request.url.path}: {error.detail}; see /docs"
        kind = MethodNotAllowedError if error.status_code == 405 else NotFoundError
        known = as_protocol_error(kind(detail), exchange.request_id, self.metrics)
        answer = problem_reply(known, exchange.request_id)
        answer.headers.update(error.headers or {})  # Allow, for 405
        answer.ended = ended
        return answer

    def _begin(
        self, request: Request, route: str, log_level: int
    ) -> tuple[Exchange, Callable[[int], None]]:
        """Return the exchange, and a function to call with the status once its answer has ended."""
        exchange = Exchange(request, _request_id(request), route, self.admission, self.pool)
        logs.bind(request_id=exchange.request_id)  # uvicorn gives each request a task of its own
        return exchange, partial(self._ended, exchange, log_level, time.perf_counter())

    def _ended(self, exchange: Exchange, log_level: int, since: float, status: int) -> None:
        seconds = time.perf_counter() - since
        self.metrics.requests.labels(exchange.route, str(status)).inc()
        self.metrics.latency.labels(exchange.route).observe(seconds)
        if exchange.work and status < 400:
            self.throughput.answered(seconds)
        elif status >= 400 and status != CLIENT_GONE and log_level > logging.DEBUG:
            self.throughput.refused()
        told = self.log_requests or status >= 500
        _log_access(exchange, log_level if told else logging.DEBUG, status, seconds)
        exchange.held.free()

    def _identify(self, exchange: Exchange) -> None:
        """Set the client of a request, a key or an address, before its body is read.

        Raises:
            UnauthorizedError: no key, where one is needed.
        """
        request = exchange.request
        try:
            client = self.check_key(request.headers.get("authorization"))
        except UnauthorizedError:
            exchange.hang_up = True
            raise
        if client:
            exchange.identify(client)
            return
        # The caller's own name is only logged: limits by name could be evaded by a new name.
        name = request.headers.get(_CLIENT_ID, "")[:_LONGEST_CLIENT_ID]
        exchange.identify("" if request.client is None else request.client.host, name)


def _request_id(request: Request) -> str:
    """Return the caller's request id if it is short and plain, else a new one."""
    given = request.headers.get(REQUEST_ID, "")
    printable = given.isascii() and given.replace("-", "").replace("_", "").isalnum()
    return given if printable and len(given) <= _LONGEST_REQUEST_ID else uuid.uuid4().hex


def _log_access(exchange: Exchange, level: int, status: int, seconds: float) -> None:
    """Log one line about a request, without its text, its token ids and its key."""
    method, route = exchange.request.method, exchange.route
    facts: dict[str, Any] = {
        "method": method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
        **exchange.work,
    }
    if caller := f"{exchange.client} {exchange.name}".strip():
        facts["client"] = caller
    logger.log(level, "%s %s %d in %.3f s", method, route, status, seconds, extra=facts)
