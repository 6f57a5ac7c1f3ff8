"""A warning that a run gives once, by what a window logs."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LogWarning(TrainerCallback):
    """A callback that looks at what is logged until it is done, and warns on the main process.

    Attributes:
        done: nothing is looked at any more.
    """

    done = False

    @abstractmethod
    def look(self, logs: Mapping[str, Any]) -> str | None:
        """Return the warning, or None; set ``done`` where a later window is not to be looked at."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.done:
            return
        warning = self.look(logs or {})
        if warning is not None and state.is_world_process_zero:
            logger = logging.getLogger(type(self).__module__)
            logger.warning("step %d: %s", state.global_step, warning)
