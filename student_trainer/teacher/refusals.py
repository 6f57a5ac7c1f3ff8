"""The errors that a teacher's responses stand for: status, headers and problem document."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from shared import logs
from shared.errors import (
    ProtocolError,
    TeacherAnswerError,
    TeacherUnauthorizedError,
    TeacherUnreachableError,
    UnavailableError,
    error_from_problem,
)
from shared.printable import one_line


def check_authorized(url: str, response: httpx.Response) -> None:
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


def check_redirect(url: str, response: httpx.Response) -> None:
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


def check_trust(url: str, error: httpx.TransportError) -> None:
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


def check_media_type(where: str, response: httpx.Response, accepted: Sequence[str]) -> None:
    """Refuse an answer that is compressed or of another media type.

    Args:
        accepted: media types; the first is the one that was requested.

    Raises:
        TeacherAnswerError: names what came and what was requested.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    kind = one_line(response.headers.get("Content-Type", accepted[0]), 100)
    if encoding != "identity" or kind.split(";")[0].strip().lower() not in accepted:
        raise TeacherAnswerError(
            f"{where} answered {kind} (Content-Encoding: {one_line(encoding, 100)}); requested "
            f"was plain {accepted[0]}. Check what stands between: a gateway, or its "
            "login page"
        )


def refusal(url: str, response: httpx.Response, content: bytes) -> ProtocolError:
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
    answered = f"{url} answered {response.status_code}{to_request()}"
    # A gateway's 5xx without a problem document is temporary, except 504: the request took long.
    if response.status_code >= 500 and response.status_code != 504 and not problem:
        return UnavailableError(answered, retry_after=retry_after)
    detail = problem.get("detail")
    problem["detail"] = f"{detail} ({answered})" if detail else answered
    return error_from_problem(response.status_code, problem, retry_after=retry_after)


def to_request() -> str:
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
