"""The findings of `student-trainer doctor` about a teacher, and about the student beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from shared.errors import (
    ConfigurationError,
    SparseGKDError,
    TeacherUnauthorizedError,
    TeacherUnreachableError,
)
from shared.protocol import InfoResponse
from student_trainer.commands.doctor_finding import Finding, Status
from student_trainer.commands.doctor_machine import install_command

if TYPE_CHECKING:
    from student_trainer.config.arguments import TeacherArguments
    from student_trainer.config.teachers import ServedTeacher

_TIMEOUT = 10.0  # seconds to wait for a teacher
_HEALTH_BYTES = 1 << 16  # in an answer to /health at most


def teacher_findings(value: str, key_file: str | None, student: str | None) -> Iterator[Finding]:
    """Yield the findings about a teacher's latency, clock, identity and key.

    Args:
        value: of ``--teacher_url``, which may give the teacher a name.
        student: folder or Hub id of a model to compare with the teacher, or None.
    """
    try:
        from student_trainer.config.arguments import TeacherArguments
        from student_trainer.config.checks import check_teacher
        from student_trainer.config.teachers import teachers_of

        flags = TeacherArguments(teacher_url=[value], teacher_api_key_file=key_file)
        check_teacher(flags)
        [served] = teachers_of([value])
        url = served.urls[0]
        seconds, skew = _ping(url)
        whom = f"teacher {served.name}".strip()
        yield Finding(whom, "ok", f"{url} answers in {seconds * 1e3:.1f} ms (best of 3)")
        if skew is not None and abs(skew) > 60:
            yield Finding(
                "teacher's clock", "warn", f"{abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}",
                "let both machines ask a time server: certificates and logs depend on it",
            )  # fmt: skip
        yield from _identity(served, flags, student)
    except TeacherUnauthorizedError as error:
        yield Finding("teacher's key", "fail", str(error), "set TEACHER_API_KEY to the server's")
    except TeacherUnreachableError as error:
        yield Finding(
            "teacher", "fail", str(error),
            "start `teacher-server serve MODEL`, or look for what stands between: a firewall, a "
            "proxy; --host 0.0.0.0 if it is another machine",
        )  # fmt: skip
    except ImportError as error:
        yield Finding(
            "teacher", "fail", f"cannot be reached: {error}", install_command("[trainer]")
        )
    except SparseGKDError as error:
        yield Finding("teacher", "fail", str(error), "give the address of a teacher-server")


def _now() -> datetime:
    return datetime.now(UTC)


def _ping(url: str) -> tuple[float, float | None]:
    """Return the seconds of the fastest of three answers, and those by which its clock is ahead.

    The clock is known to a second; None where the answer has no date.

    Raises:
        TeacherUnreachableError: no answer, or SSL_CERT_FILE cannot be read.
    """
    import httpx

    from student_trainer.teacher.http import HttpClient
    from student_trainer.teacher.sparse_gkd import SERVER

    seconds, skew = [], None
    try:
        with contextlib.closing(HttpClient(SERVER, seconds=_TIMEOUT)) as http:
            for _ in range(3):
                since = time.perf_counter()
                with http.open("GET", f"{url.rstrip('/')}/health") as response:
                    # A body that is read leaves the connection open for the next of the three.
                    b"".join(http.body(response, _HEALTH_BYTES))
                seconds.append(time.perf_counter() - since)
        with contextlib.suppress(KeyError, TypeError, ValueError):  # the date cannot be read
            skew = (parsedate_to_datetime(response.headers["Date"]) - _now()).total_seconds()
    except (httpx.HTTPError, ConfigurationError) as error:
        raise TeacherUnreachableError(f"{url}: {error or type(error).__name__}") from error
    return min(seconds), skew


def _identity(
    served: ServedTeacher, flags: TeacherArguments, student: str | None
) -> Iterator[Finding]:
    """Yield the findings about a teacher's identity and key, and its comparison with the student.

    Raises:
        TeacherError: it refuses the key, is not ready, or is not a teacher server.
    """
    from student_trainer.config.checks import api_key_of
    from student_trainer.teacher.sparse_gkd import SparseGkdTeacher

    key = api_key_of(flags)
    with SparseGkdTeacher(
        served.urls, timeout=_TIMEOUT, api_key=key, model=served.model, name=served.name
    ) as client:
        info = client.connect()
    who = info.teacher
    yield Finding(
        "teacher is", "ok",
        f"{who.model}: {who.dtype}, {who.backend} {who.version}, fingerprint "
        f"{who.fingerprint[:16]}; {info.vocab_size:,} tokens, context {info.max_model_len:,}",
    )  # fmt: skip
    yield Finding("teacher's key", *_key_status(served.urls, key is not None))
    if student is not None:
        yield from _compared(student, info)


def _compared(student: str, info: InfoResponse) -> Iterator[Finding]:
    """Yield the findings about tokenizer and end tokens of student and teacher."""
    from student_trainer.config.arguments import ModelArguments
    from student_trainer.data.end_tokens import compare_ends
    from student_trainer.model.load import load_config, load_stop_ids, load_tokenizer
    from student_trainer.teacher.compatible import check_vocabulary

    model = ModelArguments(model_name_or_path=student)
    try:
        tokenizer = load_tokenizer(model)
        rows = int(load_config(model).get_text_config().vocab_size)
        stop_ids = load_stop_ids(model, tokenizer)
        check_vocabulary(tokenizer, rows, info)
    except SparseGKDError as error:
        yield Finding("tokenizers", "fail", str(error))
        return
    yield Finding("tokenizers", "ok", "student and teacher have one vocabulary and cut text alike")
    ends = compare_ends(tokenizer, stop_ids, info)
    if ends is not None:
        yield Finding("end tokens", "warn", ends)
    else:
        names = ", ".join(repr(str(tokenizer.convert_ids_to_tokens(i))) for i in stop_ids)
        yield Finding("end tokens", "ok", f"the student ends with {names}, as the teacher does")


def _key_status(urls: Sequence[str], given: bool) -> tuple[Status, str, str]:
    from student_trainer.teacher.sparse_gkd import SparseGkdTeacher

    try:
        with SparseGkdTeacher(urls, timeout=_TIMEOUT) as stranger:
            stranger.connect()
    except TeacherUnauthorizedError:
        return "ok", "ours is accepted, and strangers are refused", ""
    if given:
        return (
            "warn",
            "ours is sent, but the teacher asks nobody for one",
            "serve with --api-key-file",
        )
    return "ok", "none is set, and the teacher asks for none", ""
