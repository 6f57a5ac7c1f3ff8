"""A warning when a student begins where its divergence is flat: disjoint from its teacher."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# Of the largest value that the divergence can have, and of the teacher's own mass on its support.
_MOST, _LEAST = 0.8, 0.05


class DisjointStudent(TrainerCallback):
    """A callback that says in the first window that the student is disjoint from its teacher.

    Above beta 0 the gradient of such a position fades with the student's probability of what the
    teacher would say: the divergence is at its bound, and stays there. Forward KL, beta 0, has the
    teacher's probability in its gradient, and does not fade.

    Args:
        beta: of the divergence that is learned.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._looked = beta == 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        found = logs or {}
        if self._looked or "train/student_top_k_mass" not in found:
            return
        self._looked = True
        mass, divergence = found["train/student_top_k_mass"], found["train/divergence"]
        apart = mass < _LEAST * found["teacher/top_k_mass"]
        if not (apart or divergence > _MOST * bound(self._beta)) or not state.is_world_process_zero:
            return
        logger.warning(
            "step %d: the student shares few tokens with its teacher (probability %.2g on the "
            "teacher's support, divergence %.3g), and --beta %g has little gradient there: "
            "start with --beta 0, and go on from its result",
            state.global_step, mass, divergence, self._beta,
        )  # fmt: skip


def bound(beta: float) -> float:
    """Return the largest generalized JSD, in nats: that of distributions without a common token.

    It is the entropy of a coin of probability ``beta``; forward and reverse KL have no bound.
    """
    if beta in (0.0, 1.0):
        return math.inf
    return -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
