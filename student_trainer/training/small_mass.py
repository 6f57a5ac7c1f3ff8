"""A warning where the teacher's k tokens hold too little of its probability."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_LEAST = 0.9


def warning_of_mass(mass: float) -> str:
    """Return the warning of a mean top-k mass, or "" where it is enough."""
    if mass >= _LEAST:
        return ""
    return (
        f"below {_LEAST:g}, so much of the teacher's probability is in the tail, of which only the "
        "sum is learned: raise --top_k_logprobs"
    )


class SmallMass(TrainerCallback):
    """A callback that says in the first window that the teacher's k tokens hold too little."""

    def __init__(self) -> None:
        self._looked = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        mass = (logs or {}).get("teacher/top_k_mass")
        if self._looked or mass is None:
            return
        self._looked = True
        if (advice := warning_of_mass(mass)) and state.is_world_process_zero:
            logger.warning("step %d: teacher/top_k_mass %.2g: %s", state.global_step, mass, advice)
