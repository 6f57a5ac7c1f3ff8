"""Write a run's lines for people to standard error, above a bar where there is a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from student_trainer.reporting.lines import held_out_line, window_line
from student_trainer.runtime.terminal import encodable, width_of


class RunLines(TrainerCallback):
    """A callback that writes one line for each logging window and each evaluation.

    Args:
        bar: show a bar below the lines. Log records are then written above it too.
    """

    def __init__(self, *, bar: bool) -> None:
        self._shows_bar = bar
        self._open = contextlib.ExitStack()
        self._bar: Any = None
        self._since: tuple[float, int] | None = None  # time and step, after the first step

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self._shows_bar and state.is_world_process_zero:
            loggers = [logging.root, logging.getLogger("transformers")]
            redirect = logging_redirect_tqdm([one for one in loggers if one.handlers], tqdm)
            self._open.enter_context(redirect)
            if transformers_logging.is_progress_bar_enabled():  # of each checkpoint's files
                transformers_logging.disable_progress_bar()
                self._open.callback(transformers_logging.enable_progress_bar)
            bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )
            self._bar = self._open.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self._since is None:
            self._since = time.monotonic(), state.global_step
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        metrics = logs or {}
        if not state.is_world_process_zero:
            return
        step, steps, width = state.global_step, state.max_steps, width_of(sys.stderr)
        if "train/loss" in metrics:
            left = self._seconds_left(step, steps, metrics.get("time/step"))
            self._write(
                window_line(metrics, step=step, steps=steps, seconds_left=left, width=width)
            )
        elif any(name.startswith("eval/") for name in metrics):
            self._write(held_out_line(metrics, step=step, steps=steps, width=width))

    def close(self) -> None:
        """Remove the bar, also of a run that failed."""
        self._open.close()
        self._bar = None

    def _seconds_left(self, step: int, steps: int, seconds: float | None) -> float | None:
        """Return the seconds left, by those since the first step, evaluations included.

        Args:
            seconds: of a step; all there is after the first one, which is not like the others.
        """
        if self._since is not None and step > self._since[1]:
            began, first = self._since
            seconds = (time.monotonic() - began) / (step - first)
        return None if seconds is None or step >= steps else seconds * (steps - step)

    def _write(self, line: str) -> None:
        line = encodable(line, sys.stderr)
        if self._bar is None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        else:
            tqdm.write(line, file=sys.stderr)
