"""A file of what a run has logged so far, for `student-trainer report` while it trains."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from student_trainer.reporting.runs import LIVE_FILE

logger = logging.getLogger(__name__)


class LiveLog(TrainerCallback):
    """A callback that appends each entry of the log to `LIVE_FILE` in the output folder.

    The first entry writes the file anew, with those before the checkpoint that the run goes on
    from. The file stays when a run is cut short. That it cannot be written ends no run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LIVE_FILE
        self._begun = self._failed = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._failed or not state.is_world_process_zero:
            return
        entries = state.log_history[-1:]
        if not self._begun:
            entries = [{"max_steps": state.max_steps}, *state.log_history]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a" if self._begun else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
            self._begun = True
        except OSError as error:
            self._failed = True
            logger.warning("%s is written no more, nor shown by a report: %s", self._path, error)

    def remove(self) -> None:
        """Delete the file, once trainer_state.json holds the same."""
        self._path.unlink(missing_ok=True)
