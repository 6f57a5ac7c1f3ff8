"""The choice of a divergence as one value, and what a loss returns for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Tail = Literal["bucket", "renormalize"]


@dataclass(frozen=True)
class Divergence:
    """A generalized Jensen-Shannon divergence over the teacher's support.

    It travels whole from the flags to the kernels: only `closed_form` and `triton` read its fields
    to compute with them.

    Attributes:
        beta: in [0, 1]: 0 forward KL(P‖Q), 1 reverse KL(Q‖P), between them the mixture with P the
            teacher and Q the student; see `generalized_jsd`.
        temperature: divides the student's logits; the teacher must have been scored at it. There is
            no T² factor.
        tail: treatment of the mass off the support. "bucket" is exact on the outcomes;
            "renormalize" drops the tail and rescales both sides over the support, which is biased,
            for comparison with systems that do so.

    Raises:
        ValueError: a field is out of its range; names the field and its value.

    Source: GKD, arXiv 2306.13649, over the coarse-grained outcomes.
    """

    beta: float = 0.5
    temperature: float = 1.0
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta {self.beta} must be from 0 (forward KL) to 1 (reverse KL)")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be above 0 and finite")
        if self.tail not in ("bucket", "renormalize"):
            raise ValueError(f"tail {self.tail!r} must be 'bucket' or 'renormalize'")


@dataclass(frozen=True)
class SparseStatistics:
    """The statistics of each position, from the pass that computes the loss; [N] float32, detached.

    For a teacher estimated from draws, its mass, its entropy and the agreement are NaN.

    Attributes:
        divergence: nats.
        teacher_support_mass, student_support_mass: probability on the support.
        teacher_entropy, student_entropy: nats over the support and the tail as one outcome, a
            lower bound of the entropy over the vocabulary.
        top1_agreement: 1 where the teacher's most probable token is the student's too.
        cross_entropy: nats, of the hard labels; NaN where there are none.
        gap_bound: nats; the dense divergence lies between ``divergence`` and ``divergence +
            gap_bound``. +inf where the masses alone give no bound; see `closed_form._gap_bound`.
    """

    divergence: torch.Tensor
    teacher_support_mass: torch.Tensor
    student_support_mass: torch.Tensor
    teacher_entropy: torch.Tensor
    student_entropy: torch.Tensor
    top1_agreement: torch.Tensor
    cross_entropy: torch.Tensor
    gap_bound: torch.Tensor

    def __repr__(self) -> str:
        count, mean = len(self.divergence), float(self.divergence.mean())
        return f"SparseStatistics({count} positions, divergence {mean:.3g})"


class LossOutput(NamedTuple):
    """A loss and the statistics of the positions that it was computed from.

    Attributes:
        loss: nats, in the arithmetic's dtype: float64 for float64 input, else float32. Each
            position's [N] from `sparse_generalized_jsd`, the scalar from `linear_sparse_jsd`.
        statistics: of each position, whether or not its weight is 0.
    """

    loss: torch.Tensor
    statistics: SparseStatistics

    def __repr__(self) -> str:
        shape = list(self.loss.shape)
        value = f"{float(self.loss):.3g}" if not shape else f"{shape}, mean {self.loss.mean():.3g}"
        return f"LossOutput(loss {value}, {self.statistics!r})"
