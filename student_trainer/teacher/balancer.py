"""The choice of the replica that gets a call: a failed one is left out until it is ready again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx

from shared.errors import (
    ProtocolError,
    TeacherAnswerError,
    TeacherError,
    TeacherUnreachableError,
)
from student_trainer.teacher.retry import FAILOVER_ERRORS, retry_after

logger = logging.getLogger(__name__)

R = TypeVar("R")

_RECHECK_SECONDS = 1.0


class Balancer:
    """A balancer of calls over one or several addresses; safe in several threads.

    A call goes to the replica with the fewest outstanding tokens. A replica that fails is excluded
    at once, and the call goes to another. A thread checks every second whether an excluded replica
    may rejoin. If all are excluded, all are tried again.

    Args:
        urls: addresses of the replicas.
        may_rejoin: returns whether a replica is ready again and the same teacher as the others. A
            `TeacherError` that it raises ends the run: the next call raises it.
        longest_pause: seconds that a replica is left alone at most, despite a Retry-After.
        who: "the teacher", with its name if it has one, for messages.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        may_rejoin: Callable[[str], bool],
        longest_pause: float,
        who: str = "the teacher",
    ) -> None:
        self._who = who[0].upper() + who[1:]
        self._urls = list(urls)
        self._may_rejoin = may_rejoin
        self._longest_pause = longest_pause
        # Running calls of each replica; each function returns the tokens that its call waits for.
        self._outstanding: dict[str, list[Callable[[], int]]] = {url: [] for url in urls}
        self._excluded: set[str] = set()
        self._fatal: TeacherError | None = None
        self._turn = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def close(self) -> None:
        """Refuse later calls, and end the threads that watch excluded replicas."""
        self._closed.set()

    def call(self, call: Callable[[str], R], left: Callable[[], int]) -> R:
        """Return the first answer of the replicas that are not excluded, each tried once.

        Args:
            left: returns the tokens whose answer is outstanding; called from any thread.

        Raises:
            TeacherUnreachableError: the balancer is closed.
            TeacherError: a replica came back as another teacher.
            Whatever ``call`` raises at the last replica, or that no other replica would mend.
        """
        tried: set[str] = set()
        while True:
            url = self._acquire(left, tried)
            tried.add(url)
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
            up = [url for url in self._urls if url not in self._excluded | tried]
            candidates = up or self._urls
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
        if len(self._urls) == 1:
            return False
        with self._lock:
            news = url not in self._excluded
            self._excluded.add(url)
            up = len(self._urls) - len(self._excluded)
            another = any(other not in self._excluded | tried for other in self._urls)
        if news:
            logger.warning("%s at %s is left out (%s); %d go on", self._who, url, error, up)
            pause = min(retry_after(error), self._longest_pause)
            name = f"teacher-back-{url}"
            threading.Thread(target=self._watch, args=(url, pause), name=name, daemon=True).start()
        return another

    def _watch(self, url: str, pause: float) -> None:
        """Wait ``pause`` seconds, then until ``url`` may rejoin, and let it.

        Another teacher there ends the run, and so does another key. Other answers, such as a
        gateway's page while the server behind it restarts, are checked again later.
        """
        self._closed.wait(pause)
        while not self._closed.wait(_RECHECK_SECONDS):
            try:
                if not self._may_rejoin(url):
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
            logger.warning("%s at %s is back", self._who, url)
            return
