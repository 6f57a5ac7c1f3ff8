"""A warning when most generated completions reach the length limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from student_trainer.training.log_warning import LogWarning

_MOST = 0.5


class CutCompletions(LogWarning):
    """A callback that says once per run that most completions were cut.

    A completion without its end teaches no end: the usual causes are a student that ends with
    another token than its teacher, and a ``max_new_tokens`` that is too low.

    Args:
        max_new_tokens: the limit, for the message.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens

    def look(self, logs: Mapping[str, Any]) -> str | None:
        share = logs.get("train/truncated", 0.0)
        if share <= _MOST:
            return None
        self.done = True
        return (
            f"{100 * share:.0f}% of the completions are cut at --max_new_tokens "
            f"{self._max_new_tokens} and teach no end: raise it, or compare the end tokens of "
            "student and teacher (student-trainer doctor)"
        )
