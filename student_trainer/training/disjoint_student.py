"""A warning when a student begins where its divergence is flat: disjoint from its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from student_trainer.training.log_warning import LogWarning

# Of the largest value that the divergence can have, and of the teacher's own mass on its support.
_MOST, _LEAST = 0.97, 0.001


class DisjointStudent(LogWarning):
    """A callback that says in the first window that the student is disjoint from its teacher.

    Above beta 0 the gradient of such a position fades with the student's probability of what the
    teacher would say: the divergence is at its bound, and stays there. Forward KL, beta 0, has the
    teacher's probability in its gradient, and does not fade.

    Args:
        beta: of the divergence that is learned.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self.done = beta == 0.0

    def look(self, logs: Mapping[str, Any]) -> str | None:
        if "train/student_top_k_mass" not in logs:
            return None
        self.done = True
        mass, divergence = logs["train/student_top_k_mass"], logs["train/divergence"]
        apart = mass < _LEAST * logs["teacher/top_k_mass"]
        if not (apart or divergence > _MOST * bound(self._beta)):
            return None
        return (
            f"the student shares few tokens with its teacher (probability {mass:.2g} on the "
            f"teacher's support, divergence {divergence:.3g}), and --beta {self._beta:g} has "
            "little gradient there: start with --beta 0, and go on from its result"
        )


def bound(beta: float) -> float:
    """Return the largest generalized JSD, in nats: that of distributions without a common token.

    It is the entropy of a coin of probability ``beta``; forward and reverse KL have no bound.
    """
    if beta in (0.0, 1.0):
        return math.inf
    return -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)
