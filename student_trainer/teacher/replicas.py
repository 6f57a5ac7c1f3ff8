"""The client of one teacher at several addresses: HTTP, balancing, retries and counts composed."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from shared import logs
from shared.address import is_loopback
from shared.errors import DeadlineExceededError, TeacherChangedError, TeacherUnreachableError
from shared.protocol import InfoResponse
from student_trainer.runtime.threads import in_thread
from student_trainer.teacher.balancer import Balancer
from student_trainer.teacher.http import HttpClient, ServerKind
from student_trainer.teacher.retry import TRANSIENT_ERRORS, RetryPolicy, Unreachable
from student_trainer.teacher.traffic import Traffic

logger = logging.getLogger(__name__)

R = TypeVar("R")

_CONNECTIONS = 8


class Replicas:
    """A client of one teacher behind one or several addresses; safe in several threads.

    A replica that fails (no connection, no answer in time, 429, 5xx) is excluded by the balancer,
    and the request goes to another. If all failed, the retry policy says when to begin again.

    Args:
        urls: addresses, such as ``http://host:8000``.
        server: the kind of server that listens there.
        timeout: seconds to wait for an answer, with retries; one attempt gets an equal share of it
            for each replica, so that a replica that hangs leaves time for the others.
        rejoins: returns whether a replica that is ready again is the same teacher as the others. A
            `TeacherError` that it raises ends the run: the next request raises it.
        api_key: sent with every request, to these addresses only.
        unreachable: behaviour when a request failed and no replica is ready: "wait" until
            ``timeout``, or "stop" at once.
        absent_timeout: seconds to wait for a server where nothing listens, if that is less.
        local_absent_timeout: the same for addresses of this machine, and in `connect` alone.
        name: the teacher's name, for messages, or empty.

    Attributes:
        urls: the addresses, without a slash at the end.
        http: sends a request to one of them, once.
        traffic: counts bytes and scored tokens.

    Raises:
        ConfigurationError: the certificates that SSL_CERT_FILE names cannot be read.
    """

    def __init__(
        self,
        urls: Sequence[str],
        server: ServerKind,
        *,
        timeout: float,
        rejoins: Callable[[str], bool],
        api_key: str | None,
        unreachable: Unreachable = "wait",
        absent_timeout: float = math.inf,
        local_absent_timeout: float = math.inf,
        name: str = "",
    ) -> None:
        self._who = f"the teacher {name}" if name else "the teacher"
        self.urls = [url.rstrip("/") for url in urls]
        self.traffic = Traffic()
        self.http = HttpClient(
            server, seconds=timeout / len(self.urls), api_key=api_key, traffic=self.traffic
        )
        self._balancer = Balancer(
            self.urls,
            may_rejoin=lambda url: not self.http.why_not_ready(url) and rejoins(url),
            longest_pause=timeout,
            who=self._who,
        )
        self._retries = RetryPolicy(
            [f"{self._who} at {', '.join(self.urls)}"] if name else self.urls,
            timeout=timeout,
            start=server.start,
            unreachable=unreachable,
            nobody_ready=lambda: all(map(self.http.why_not_ready, self.urls)),
            absent_timeout=absent_timeout,
            nobody_listens=self.switched_off,
        )
        self._absent_timeout = absent_timeout
        self._local_absent_timeout = local_absent_timeout
        self._announced: set[str] = set()  # addresses whose absence was logged
        self._server = server
        self._timeout = timeout
        self._slots = threading.Semaphore(_CONNECTIONS)

    def close(self) -> None:
        """Close the client; requests in flight fail."""
        self._balancer.close()
        self.http.close()

    def submit(self, work: Callable[..., R], *arguments: Any, **options: Any) -> Future[R]:
        """Run ``work`` in a thread, as many at once as there are connections."""

        def run() -> R:
            with self._slots:
                return work(*arguments, **options)

        return in_thread(run, name="teacher")

    def call(self, call: Callable[[str], R], left: Callable[[], int]) -> R:
        """Return ``call(url)`` of a replica, or of another one if it fails, until the timeout.

        All attempts carry one request id, which the servers and this client log.

        Args:
            left: returns the tokens whose answer is outstanding; called from any thread.

        Raises:
            TeacherUnreachableError: no answer within the timeout, or the client is closed.
            TeacherError: a replica came back as another teacher.
            Whatever else ``call`` raises.
        """
        request_id, attempts = uuid.uuid4().hex, itertools.count(1)

        def attempt(url: str) -> R:
            logs.bind(attempt=next(attempts))
            return call(url)

        with logs.bound(request_id=request_id):
            return self._retries.run(lambda: self._balancer.call(attempt, left), request_id)

    def connect(
        self, describe: Callable[[str], InfoResponse], known: InfoResponse | None
    ) -> InfoResponse:
        """Wait until every replica is ready, and return the description of the one teacher.

        Args:
            describe: returns the description by one replica.
            known: the description by an earlier call, if there was one.

        Raises:
            TeacherUnreachableError: a replica is not ready within the timeout.
            TeacherChangedError: the replicas are different teachers.
            Whatever else ``describe`` raises.
        """
        self._wait_until_ready()
        for url in self.urls:
            info = self.call_ready(url, describe)
            if known is None:
                known = info
            elif info.teacher != known.teacher:
                raise TeacherChangedError(
                    f"the replicas are different teachers: {self.urls[0]} is {known.teacher}, "
                    f"{url} is {info.teacher}. Serve one model, or give one --teacher_url"
                )
        assert known is not None  # there is at least one address
        return known

    def call_ready(self, url: str, call: Callable[[str], R]) -> R:
        """Return ``call(url)`` of a replica that was ready a moment ago.

        Raises:
            TeacherUnreachableError: the replica does not answer any more.
        """
        try:
            return call(url)
        except (*TRANSIENT_ERRORS, DeadlineExceededError) as error:
            raise TeacherUnreachableError(
                f"{self._who} at {url} was ready and does not answer now: {error}"
            ) from error

    def switched_off(self) -> bool:
        """Return whether nothing listens at any address; a server that loads its model listens.

        Raises:
            TeacherUnreachableError: a certificate is not trusted.
        """
        return not any(map(self.http.listens, self.urls))

    def ready(self) -> bool:
        """Return whether every replica is ready now, and log which is not.

        Raises:
            As `connect`, where waiting is of no use.
        """
        problems = {url: self.http.why_not_ready(url) for url in self.urls}
        for url, problem in problems.items():
            if problem:
                self._announce(url, problem)
        return not any(problems.values())

    def _announce(self, url: str, problem: str) -> None:
        """Log, the first time, that a replica is waited for, and how to start it."""
        if url not in self._announced:
            self._announced.add(url)
            patience, bound = self._timeout, "--teacher_timeout"
            if "nothing listens" in problem and self._absence_allowed(url) < patience:
                patience, bound = self._absence_allowed(url), self._more_absence(url)
            remedy = f". Is the server running? Start it with `{self._server.start}`"
            logger.warning(
                "Waiting for %s at %s: it %s; %.0f s left (%s), Ctrl-C ends the wait%s",
                self._who, url, problem, patience, bound, "" if "answers" in problem else remedy,
            )  # fmt: skip

    def _absence_allowed(self, url: str) -> float:
        """Return the seconds that nothing may listen at an address before it is given up."""
        local = self._local_absent_timeout if is_loopback(url) else math.inf
        return min(self._absent_timeout, local)

    def _more_absence(self, url: str) -> str:
        """Return what allows more of them."""
        if self._absence_allowed(url) == self._absent_timeout:
            return "raise --absent_timeout"
        return f"give --teacher_timeout, other than {self._timeout:g}, to wait longer"

    def _wait_until_ready(self) -> None:
        """Wait until every replica is ready, and log a message now and then.

        Raises:
            TeacherAnswerError: something other than a teacher listens there.
            TeacherUnauthorizedError: a gateway before it requires a key, or another one.
            TeacherUnreachableError: a replica is not ready within the timeout, or its certificate
                is not trusted.
        """
        deadline = time.monotonic() + self._timeout
        for url in self.urls:
            self._wait_for(url, deadline)

    def _wait_for(self, url: str, deadline: float) -> None:
        since, times = time.monotonic(), reminder_seconds()
        due = next(times)
        while problem := self.http.why_not_ready(url):
            waited, left = time.monotonic() - since, deadline - time.monotonic()
            allowed = self._absence_allowed(url)
            absent = waited >= allowed and not self.http.listens(url)
            if left <= 0 or absent:
                patience, remedy = self._timeout, "raise --teacher_timeout"
                if absent:
                    patience, remedy = allowed, self._more_absence(url)
                start = "" if "answers" in problem else f"Start it with `{self._server.start}`, "
                raise TeacherUnreachableError(
                    f"{self._who} at {url} {problem} after {patience:g} s. {start}"
                    f"{'check' if start else 'Check'} --teacher_url, or {remedy}"
                )
            self._announce(url, problem)
            if waited >= due:
                if "nothing listens" in problem:
                    left = min(left, allowed - waited)
                logger.warning(
                    "Waiting for %s at %s: it %s; %.0f s left", self._who, url, problem, left
                )
                due = next(seconds for seconds in times if seconds > waited)
            time.sleep(min(0.5, left))


def reminder_seconds() -> Iterator[float]:
    """Yield the seconds of a wait after which it is told of again."""
    yield from (5.0, 10.0, 30.0)
    yield from itertools.count(60.0, 60.0)


def connected_info(info: InfoResponse | None) -> InfoResponse:
    """Return the description that `Teacher.connect` has set.

    Raises:
        RuntimeError: `connect` was not called.
    """
    if info is None:
        raise RuntimeError("call connect() first")
    return info
