"""The checks of the teacher's addresses, key and cache, and the key itself."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from shared.api_keys import check_key, read_keys
from shared.errors import ConfigurationError
from student_trainer.config.arguments import TeacherArguments


def check_teacher(teacher: TeacherArguments) -> None:
    if not teacher.teacher_url:
        raise ConfigurationError(
            "--teacher_url is missing: start `teacher-server serve MODEL` and give its address, "
            "such as --teacher_url http://localhost:8000"
        )
    for url in teacher.teacher_url:
        if "@" in url:  # the message must not show the password
            raise ConfigurationError(
                "--teacher_url holds a user or a password, which every log would show; give a key "
                "by the environment variable TEACHER_API_KEY or by --teacher_api_key_file"
            )
        if not _is_address(url):
            raise ConfigurationError(f"--teacher_url {url!r} must look like http://host:8000")
    api_key_of(teacher)
    if teacher.top_k_logprobs < 1:
        raise ConfigurationError(f"--top_k_logprobs {teacher.top_k_logprobs} must be at least 1")
    dtype = teacher.teacher_logprob_dtype
    if teacher.teacher_protocol == "vllm" and dtype != TeacherArguments.teacher_logprob_dtype:
        raise ConfigurationError(
            f"--teacher_logprob_dtype {dtype} has no effect with --teacher_protocol vllm, which "
            "sends decimal numbers; drop it"
        )
    if not teacher.teacher_timeout > 0:
        raise ConfigurationError(f"--teacher_timeout {teacher.teacher_timeout} must be above 0")
    if not teacher.teacher_repeat_tolerance >= 0:
        raise ConfigurationError(
            f"--teacher_repeat_tolerance {teacher.teacher_repeat_tolerance} must be 0 or above"
        )
    _check_cache(teacher)


def _check_cache(teacher: TeacherArguments) -> None:
    if teacher.teacher_cache is None:
        if teacher.teacher_cache_max_gb != TeacherArguments.teacher_cache_max_gb:
            raise ConfigurationError(
                "--teacher_cache_max_gb has no effect without --teacher_cache; drop it"
            )
        return
    if not 0 < teacher.teacher_cache_max_gb < float("inf"):
        raise ConfigurationError(
            f"--teacher_cache_max_gb {teacher.teacher_cache_max_gb} must be above 0"
        )
    if teacher.teacher_protocol == "vllm":
        raise ConfigurationError(
            "--teacher_cache needs a teacher that tells which weights it has: a stock vLLM does "
            "not. Use `teacher-server serve`, or drop it"
        )
    if teacher.accept_teacher_change:
        raise ConfigurationError(
            "--teacher_cache keeps answers of one teacher apart from another's; drop it, or "
            "--accept_teacher_change"
        )


def api_key_of(teacher: TeacherArguments) -> str | None:
    """Return the teacher's key, from ``--teacher_api_key_file`` or else from the environment.

    It is in no argument, so that nothing that saves or logs arguments can hold it.

    Raises:
        ConfigurationError: a file without a key or with several, or an invalid key.
    """
    path = teacher.teacher_api_key_file
    if path is None:
        key = os.environ.get("TEACHER_API_KEY")
        return check_key(key, "TEACHER_API_KEY") if key else None
    first, *others = read_keys(path, "--teacher_api_key_file")
    if others:
        raise ConfigurationError(
            f"--teacher_api_key_file {path} holds {1 + len(others)} keys; the trainer sends one"
        )
    return first


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for an invalid port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
