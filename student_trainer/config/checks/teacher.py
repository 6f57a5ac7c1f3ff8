"""The checks of the teacher's addresses, key and cache, and the key itself."""

from __future__ import annotations

import os

from shared.api_keys import check_key, read_keys
from shared.errors import ConfigurationError
from student_trainer.config.arguments import DatasetArguments, TeacherArguments
from student_trainer.config.teachers import check_teacher_sync, teachers_of

# Flags that say which teacher a row has, and what only that one sees.
_OF_ROWS = (
    "teacher_column",
    "dataset_teacher",
    "teacher_prompt_template",
    "teacher_chat_template_kwargs",
)


def check_teacher(teacher: TeacherArguments) -> None:
    if not teacher.teacher_url:
        raise ConfigurationError(
            "--teacher_url is missing: start `teacher-server serve MODEL` and give its address, "
            "such as --teacher_url http://localhost:8000"
        )
    if teacher.teacher_sync is not None:
        check_teacher_sync(teacher.teacher_sync)
    _check_names(teacher)
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


def _check_names(teacher: TeacherArguments) -> None:
    """Refuse flags about named teachers where none is named, and names that no teacher has."""
    names = [one.name for one in teachers_of(teacher.teacher_url or []) if one.name]
    _ = teacher.template_kwargs
    for flag in ("dataset_teacher", "teacher_column"):
        value = getattr(teacher, flag)
        if not names and value != getattr(TeacherArguments, flag):
            raise ConfigurationError(
                f"--{flag} {value} has no effect, because --teacher_url names no teachers: give "
                "NAME=URL, or drop it"
            )
    for name in teacher.dataset_teacher or ():
        if name not in names:
            raise ConfigurationError(
                f"--dataset_teacher {name}: no --teacher_url has this name, only {', '.join(names)}"
            )


def check_dataset_teachers(teacher: TeacherArguments, dataset: DatasetArguments) -> None:
    """Refuse a ``--dataset_teacher`` that does not name one teacher for each dataset.

    Raises:
        ConfigurationError: there are more or fewer, or the rows are in memory.
    """
    names = teacher.dataset_teacher
    if names is None:
        return
    given = f"--dataset_teacher {' '.join(names)}"
    if dataset.rows is not None:
        raise ConfigurationError(
            f"{given} has no effect on rows in memory; name their teacher in --teacher_column"
        )
    if len(names) != len(dataset.dataset_name):
        raise ConfigurationError(
            f"{given}: {len(names)} teachers for {len(dataset.dataset_name)} datasets; give one "
            "for each"
        )


def check_teacher_of_references(teacher: TeacherArguments) -> None:
    """Refuse what `evaluate`, which compares with one teacher on the prompts as they are, ignores.

    Raises:
        ConfigurationError: several teachers, or a flag about whose rows are whose.
    """
    served = teachers_of(teacher.teacher_url or [])
    if len(served) > 1:
        raise ConfigurationError(
            f"--teacher_url names {len(served)} teachers, and `evaluate` compares with one; give "
            f"{served[0].name} alone, or another"
        )
    for flag in _OF_ROWS:
        value = getattr(teacher, flag)
        if value != getattr(TeacherArguments, flag):
            given = " ".join(value) if isinstance(value, list) else value
            raise ConfigurationError(f"--{flag} {given} has no effect on `evaluate`; drop it")


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
    return key_of(teacher.teacher_api_key_file, "--teacher_api_key_file", "TEACHER_API_KEY")


def key_of(path: str | None, flag: str, variable: str) -> str | None:
    """Return the only key of a file, or else of an environment variable, or None.

    Raises:
        ConfigurationError: a file without a key or with several, or an invalid key.
    """
    if path is None:
        key = os.environ.get(variable)
        return check_key(key, variable) if key else None
    first, *others = read_keys(path, flag)
    if others:
        raise ConfigurationError(
            f"{flag} {path} holds {1 + len(others)} keys; the trainer sends one"
        )
    return first
