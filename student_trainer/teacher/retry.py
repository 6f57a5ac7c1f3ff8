"""Errors after which another replica is tried, and the rules by which a request is sent again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    wait_random_exponential,
)

from shared.errors import (
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    ProtocolError,
    TeacherUnreachableError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

R = TypeVar("R")

Unreachable = Literal["wait", "stop"]

_ATTEMPTS_AT_A_500 = 3
_backoff = wait_random_exponential(multiplier=0.25, max=30.0)

# After these errors the same request may succeed later, at the same replica.
TRANSIENT_ERRORS = (httpx.TransportError, OverloadedError, UnavailableError)
# After these errors the same request may succeed now, at another replica.
FAILOVER_ERRORS = (*TRANSIENT_ERRORS, InternalError, DeadlineExceededError)


@dataclass(frozen=True)
class RetryPolicy:
    """A policy of retries: exponential back-off with full jitter, until ``timeout``.

    A 500 is tried again only a few times.

    Attributes:
        urls: the addresses, for messages.
        timeout: seconds from the first attempt to the last.
        start: the command that starts such a server, for messages.
        unreachable: behaviour when no replica is ready: "wait" until ``timeout``, or "stop".
        nobody_ready: returns whether no replica is ready; called only for "stop".
        absent_timeout: seconds to try again where nothing listens, if that is less.
        nobody_listens: returns whether nothing does; called only after ``absent_timeout``.
    """

    urls: Sequence[str]
    timeout: float
    start: str
    unreachable: Unreachable
    nobody_ready: Callable[[], bool]
    absent_timeout: float = math.inf
    nobody_listens: Callable[[], bool] = lambda: False

    def run(self, attempt: Callable[[], R], request_id: str) -> R:
        """Return what ``attempt`` returns, and repeat it after errors that may pass.

        Args:
            request_id: id of the request, for messages.

        Raises:
            TeacherUnreachableError: no answer within ``timeout`` seconds.
            Whatever else ``attempt`` raises.
        """
        retrying = Retrying(
            retry=retry_if_exception_type((*TRANSIENT_ERRORS, InternalError)),
            stop=self._gives_up,
            wait=self._pause,
            before_sleep=self._log_retry,
            reraise=True,
        )
        since = time.monotonic()
        try:
            return retrying(attempt)
        except TRANSIENT_ERRORS as error:
            if self.unreachable == "stop":
                tried, remedy = "", "give --teacher_unreachable wait"
            elif time.monotonic() - since < self.timeout:
                tried, remedy = f" within {self.absent_timeout:g} s", "raise --absent_timeout"
            else:
                tried, remedy = f" within {self.timeout:g} s", "raise --teacher_timeout"
            raise TeacherUnreachableError(
                f"no answer from {', '.join(self.urls)}{tried}: {error}. Check that "
                f"`{self.start}` runs there, and its log of request {request_id}, or {remedy}"
            ) from error

    def _gives_up(self, state: RetryCallState) -> bool:
        """Return whether to stop retrying: time is up, a 500 repeats, or nothing is waited for."""
        if (state.seconds_since_start or 0.0) >= self.timeout:
            return True
        if isinstance(_error(state), InternalError):
            return state.attempt_number >= _ATTEMPTS_AT_A_500
        if (state.seconds_since_start or 0.0) >= self.absent_timeout and self.nobody_listens():
            return True
        return self.unreachable == "stop" and self.nobody_ready()

    def _pause(self, state: RetryCallState) -> float:
        """Return the seconds to the next attempt, never past ``timeout``, despite a Retry-After."""
        left = self._left(state)
        if isinstance(_error(state), httpx.TransportError):
            until_absent = self.absent_timeout - (state.seconds_since_start or 0.0)
            left = min(left, until_absent if until_absent > 0 else math.inf)
        return max(0.0, min(left, max(retry_after(_error(state)), _backoff(state))))

    def _log_retry(self, state: RetryCallState) -> None:
        pause = state.next_action.sleep if state.next_action else 0.0
        logger.warning(
            "Teacher call failed at %s (%s); next try in %.1f s, %.0f s left",
            ", ".join(self.urls), _error(state), pause, self._left(state),
        )  # fmt: skip

    def _left(self, state: RetryCallState) -> float:
        return self.timeout - (state.seconds_since_start or 0.0)


def retry_after(error: BaseException | None) -> float:
    """Return the seconds that a server asks to be left alone for; 0 if it names none."""
    return (error.retry_after or 0.0) if isinstance(error, ProtocolError) else 0.0


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
