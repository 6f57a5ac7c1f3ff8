"""The former parameters of a teacher's `score`, which still work for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from student_trainer.teacher.base import ScoreOptions

F = TypeVar("F", bound=Callable[..., Any])

_FORMER = ("top_k", "temperature", "sample_seed")


def former_score_parameters(function: F) -> F:
    """Let `score` be called with ``top_k`` and what went with it in place of `ScoreOptions`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "top_k" not in kwargs:  # it had no default, so this is no call of the former form
            return function(*args, **kwargs)
        options = ScoreOptions(**{name: kwargs.pop(name) for name in _FORMER if name in kwargs})
        warnings.warn(
            f"pass ScoreOptions to score in place of top_k, temperature and sample_seed: {options}",
            DeprecationWarning,
            stacklevel=2,
        )
        return function(*args, options=options, **kwargs)

    return cast(F, wrapper)
