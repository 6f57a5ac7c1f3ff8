"""Log what the Trainer logs as records, instead of printing it."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class LogLines(TrainerCallback):
    """A callback that logs a record for each window, with the fields ``step`` and ``metrics``."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        if state.is_world_process_zero:
            fields = {"step": state.global_step, "metrics": dict(logs or {})}
            logger.info("step %d of %d", state.global_step, state.max_steps, extra=fields)
