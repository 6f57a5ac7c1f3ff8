"""A warning when most generated completions reach the length limit."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_MOST = 0.5


class CutCompletions(TrainerCallback):
    """A callback that says once per run that most completions were cut.

    A completion without its end teaches no end: the usual causes are a student that ends with
    another token than its teacher, and a ``max_new_tokens`` that is too low.

    Args:
        max_new_tokens: the limit, for the message.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens
        self._warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        share = (logs or {}).get("train/truncated", 0.0)
        if self._warned or share <= _MOST or not state.is_world_process_zero:
            return
        self._warned = True
        logger.warning(
            "step %d: %.0f%% of the completions are cut at --max_new_tokens %d and teach no end: "
            "raise it, or compare the end tokens of student and teacher (student-trainer doctor)",
            state.global_step, 100 * share, self._max_new_tokens,
        )  # fmt: skip
