"""The tree of all errors that this project raises.

SparseGKDError
├── ProtocolError             travels over HTTP as an RFC 9457 problem document
│   ├── MalformedRequestError     400
│   ├── UnauthorizedError         401
│   ├── NotFoundError             404
│   ├── MethodNotAllowedError     405
│   ├── PayloadTooLargeError      413
│   ├── UnsupportedMediaTypeError 415
│   ├── InvalidRequestError       422
│   ├── OverloadedError           429
│   ├── InternalError             500
│   ├── UnavailableError          503
│   └── DeadlineExceededError     504
├── TeacherError              a teacher that the trainer cannot use
│   ├── TeacherUnreachableError
│   ├── TeacherUnauthorizedError
│   ├── TeacherAnswerError
│   ├── TeacherChangedError
│   └── TokenizerMismatchError
├── RolloutError              the student cannot generate
│   └── RolloutServerError    no server is left that has its weights
├── ConfigurationError        flags and settings, before any model loads
├── CheckpointError           a checkpoint or model that could not be written
├── NonFiniteError            names the step and the file that keeps its batch
├── CellFailedError           a command of a study that failed
└── DatasetError              names the file and line, or the row
    └── RowTooLongError
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from shared.printable import one_line


class SparseGKDError(Exception):
    """The root of every error that this project raises on purpose.

    Attributes:
        exit_code: of a command that ends with it: 1 a run that failed, 2 wrong flags, key or data.
    """

    exit_code: ClassVar[int] = 1


class ProtocolError(SparseGKDError):
    """A refusal with a status code, carried as an RFC 9457 problem document.

    Args:
        detail: what was wrong, the value, and what to do.
        field: path of the offending field, such as ``sequences.0.token_ids``.
        retry_after: seconds after which the same request may succeed.
        request_id: the id under which the server logged the request.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Protocol error"

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.retry_after = retry_after
        self.request_id = request_id

    @classmethod
    def slug(cls) -> str:
        return cls.title.lower().replace(" ", "-")

    def to_problem(self, request_id: str) -> dict[str, Any]:
        """Return the RFC 9457 document: type, title, status, detail, request_id and any field."""
        problem: dict[str, Any] = {
            "type": f"urn:sparse-gkd:problem:{self.slug()}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.field is not None:
            problem["field"] = self.field
        return problem


class MalformedRequestError(ProtocolError):
    """A body that cannot be decoded in its media type."""

    status, title = 400, "Malformed request"


class UnauthorizedError(ProtocolError):
    """A request without a key that the server accepts."""

    status, title = 401, "Unauthorized"


class NotFoundError(ProtocolError):
    """A request for a path or a model that the server does not have."""

    status, title = 404, "Not found"


class MethodNotAllowedError(ProtocolError):
    """A request by a method that its path does not have."""

    status, title = 405, "Method not allowed"


class PayloadTooLargeError(ProtocolError):
    """A body or a sequence that is too large to be read or computed."""

    status, title = 413, "Payload too large"


class UnsupportedMediaTypeError(ProtocolError):
    """A body in a media type that the server does not read."""

    status, title = 415, "Unsupported media type"


class InvalidRequestError(ProtocolError):
    """A well-formed request that the server cannot serve as it is; names the field."""

    status, title = 422, "Invalid request"


class OverloadedError(ProtocolError):
    """A request that finds no room now, and may succeed later."""

    status, title = 429, "Overloaded"


class InternalError(ProtocolError):
    """A failure of the server itself, such as log-probs that are not finite."""

    status, title = 500, "Internal error"


class UnavailableError(ProtocolError):
    """A server that loads, shuts down or has lost its engine."""

    status, title = 503, "Unavailable"


class DeadlineExceededError(ProtocolError):
    """A request that was not answered within the server's request timeout."""

    status, title = 504, "Deadline exceeded"


_BY_STATUS: dict[int, type[ProtocolError]] = {
    error.status: error
    for error in (
        MalformedRequestError,
        UnauthorizedError,
        NotFoundError,
        MethodNotAllowedError,
        PayloadTooLargeError,
        UnsupportedMediaTypeError,
        InvalidRequestError,
        OverloadedError,
        InternalError,
        UnavailableError,
        DeadlineExceededError,
    )
}


def error_from_problem(
    status: int, problem: Mapping[str, Any], *, retry_after: float | None = None
) -> ProtocolError:
    """Return the exception of a problem document; an unknown status gives a `ProtocolError`.

    The texts are untrusted: control characters are escaped, and long texts are cut.
    """
    detail = str(problem.get("detail") or f"the server answered {status} without a detail")
    field, request_id = (
        one_line(text, 200) if isinstance(text, str) else None
        for text in (problem.get("field"), problem.get("request_id"))
    )
    return _BY_STATUS.get(status, ProtocolError)(
        one_line(detail),
        field=field,
        request_id=request_id,
        retry_after=retry_after,
    )


class TeacherError(SparseGKDError):
    """A teacher that the trainer cannot use."""


class TeacherUnreachableError(TeacherError):
    """A teacher that did not answer within the time allowed."""


class TeacherUnauthorizedError(TeacherError):
    """A teacher that refuses this trainer's requests: no key, or another one than its own."""

    exit_code = 2


class TeacherAnswerError(TeacherError):
    """An answer that cannot be used: not decodable, wrong shape, or non-finite log-probs."""


class TeacherChangedError(TeacherError):
    """A different teacher at the same address, or replicas that differ."""


class TokenizerMismatchError(TeacherError):
    """A teacher and a student without a common vocabulary, so token ids mean different things."""

    exit_code = 2


class RolloutError(SparseGKDError):
    """A student that cannot generate: its logits are not finite, or its engine failed."""


class RolloutServerError(RolloutError):
    """No rollout server is left that has the student's weights."""


class ConfigurationError(SparseGKDError):
    """A flag or setting that cannot work, found before any model loads."""

    exit_code = 2


class CheckpointError(SparseGKDError):
    """A checkpoint or trained model that could not be written; earlier ones are untouched."""


class NonFiniteError(SparseGKDError):
    """A training step whose loss or gradient is NaN or infinite; it changed no weights."""


class CellFailedError(SparseGKDError):
    """A command of a study that failed; the message ends with its log."""


class DatasetError(SparseGKDError):
    """A row that cannot be trained on; the message names the file and line, or the row."""

    exit_code = 2


class RowTooLongError(DatasetError):
    """A row that leaves no room for a completion; it may be left out when the user says so."""
