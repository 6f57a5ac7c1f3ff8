"""A warning where the teacher's k tokens hold too little of its probability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from student_trainer.training.log_warning import LogWarning

_LEAST = 0.9


def warning_of_mass(mass: float) -> str:
    """Return the warning of a mean top-k mass, or "" where it is enough."""
    if mass >= _LEAST:
        return ""
    return (
        f"below {_LEAST:g}, so much of the teacher's probability is in the tail, of which only the "
        "sum is learned: raise --top_k_logprobs"
    )


class SmallMass(LogWarning):
    """A callback that says in the first window that the teacher's k tokens hold too little."""

    def look(self, logs: Mapping[str, Any]) -> str | None:
        mass = logs.get("teacher/top_k_mass")
        if mass is None:
            return None
        self.done = True
        advice = warning_of_mass(mass)
        return f"teacher/top_k_mass {mass:.2g}: {advice}" if advice else None
