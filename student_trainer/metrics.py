"""Sums of one logging window, and the averages that are logged from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from student_trainer.losses import SparseStatistics
from student_trainer.support import ScoredSample

_PER_TOKEN = {
    "divergence": "divergence",
    "teacher_support_mass": "teacher_top_k_mass",
    "student_support_mass": "student_top_k_mass",
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "student_entropy",
    "top1_agreement": "top1_agreement",
    "cross_entropy": "cross_entropy",
    "gap_bound": "divergence_gap_bound",
}


class WindowMetrics:
    """What happened since the last log, summed; sums are added over ranks before dividing.

    Logged, all per learned token unless said otherwise: ``divergence`` (nats), ``teacher_entropy``
    and ``student_entropy`` (nats, over support and tail: a lower bound), ``teacher_top_k_mass`` and
    ``student_top_k_mass`` (probability on the support), ``top1_agreement`` (share of rows whose
    most probable token is the same), ``cross_entropy`` (nats, of the completions' own tokens),
    ``divergence_gap_bound`` (nats by which the dense divergence is above ``divergence`` at most;
    only for beta between 0 and 1, elsewhere nothing bounds it), ``completion_length`` (tokens a
    completion), ``truncated`` (share of completions), ``on_policy`` (share of steps),
    ``padding_fraction`` (share of padding among the positions of the training passes),
    ``seconds_teacher``, ``seconds_generating``, ``seconds_training`` (a step and rank, waiting for
    the teacher first), ``bytes_per_token`` (received for each scored token).
    """

    _SUMS = (
        *_PER_TOKEN.values(),
        "tokens",
        "completions",
        "completion_tokens",
        "truncated",
        "on_policy",
        "steps",
        "seconds_teacher",
        "seconds_generating",
        "seconds_training",
        "bytes",
        "scored_tokens",
        "positions",
        "padding",
    )

    def __init__(self) -> None:
        self._sums: dict[str, float | torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        self._sums = dict.fromkeys(self._SUMS, 0.0)

    def add(self, name: str, amount: float | torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + amount

    def add_seconds(self, name: str, seconds: float) -> None:
        self.add(f"seconds_{name}", seconds)

    def add_statistics(self, statistics: SparseStatistics) -> None:
        """Per-token statistics of one micro-batch; stays on the device."""
        for field in fields(statistics):
            if field.name in _PER_TOKEN:
                self.add(_PER_TOKEN[field.name], getattr(statistics, field.name).sum())
        self.add("tokens", len(statistics.divergence))

    def add_step(self, scored: Sequence[ScoredSample], *, on_policy: bool) -> None:
        self.add("steps", 1)
        self.add("on_policy", on_policy)
        self.add("completions", len(scored))
        self.add("truncated", sum(item.sample.truncated for item in scored))
        self.add("completion_tokens", sum(len(item.sample.completion_mask) for item in scored))

    def add_inputs(self, positions: int, tokens: int) -> None:
        """A micro-batch that computes ``positions`` hidden states for ``tokens`` real tokens."""
        self.add("positions", positions)
        self.add("padding", positions - tokens)

    def drain(
        self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], *, with_teacher: bool
    ) -> dict[str, float]:
        """Averages of the window, which begins anew; empty when no step was taken in it."""
        values = torch.tensor([float(self._sums[name]) for name in self._SUMS], dtype=torch.float64)
        self.reset()
        total = dict(zip(self._SUMS, sum_over_ranks(values).tolist(), strict=True))
        if not total["steps"] or not total["tokens"]:
            return {}
        logs: dict[str, float] = {}
        logs["completion_length"] = total["completion_tokens"] / total["completions"]
        logs["truncated"] = total["truncated"] / total["completions"]
        logs["padding_fraction"] = total["padding"] / total["positions"]
        logs["seconds_training"] = total["seconds_training"] / total["steps"]
        if with_teacher:
            per_token = {name: total[name] / total["tokens"] for name in _PER_TOKEN.values()}
            logs |= {name: mean for name, mean in per_token.items() if math.isfinite(mean)}
            logs["on_policy"] = total["on_policy"] / total["steps"]
            logs["seconds_teacher"] = total["seconds_teacher"] / total["steps"]
            logs["seconds_generating"] = total["seconds_generating"] / total["steps"]
            if total["scored_tokens"]:
                logs["bytes_per_token"] = total["bytes"] / total["scored_tokens"]
        return logs
