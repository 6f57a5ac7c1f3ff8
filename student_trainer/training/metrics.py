"""The sums of one logging window, and the averages that are logged from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

import torch

from student_trainer.data.sample import Sample
from student_trainer.losses import SparseStatistics
from student_trainer.runtime.timeline import ACTIVITIES

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
# The sums of each teacher, where there are several.
_OF_EACH = ("tokens", "divergence", "mass", "scored_tokens", "waited")
_WITHOUT_TEACHER = ("step", "forward_backward", "optimizer")


class WindowMetrics:
    """The sums since the last log; they are added over ranks before they are divided.

    The log has these under the groups of `reporting.names`, such as ``teacher/entropy``.

    Logged, all per learned token unless said otherwise: ``divergence`` (nats), ``teacher_entropy``
    and ``student_entropy`` (nats, over support and tail: a lower bound), ``teacher_top_k_mass`` and
    ``student_top_k_mass`` (probability on the support), ``top1_agreement`` (share of positions
    whose most probable token is the same), ``cross_entropy`` (nats, of the completions' tokens),
    ``divergence_gap_bound`` (nats by which the dense divergence is above ``divergence`` at most;
    only for beta between 0 and 1, elsewhere nothing bounds it), ``completion_length`` (tokens a
    completion), ``truncated`` (share of completions), ``on_policy`` (share of steps),
    ``padding_fraction`` (share of padding among the positions of the training passes),
    ``staleness`` and ``staleness_max`` (optimizer steps between the weights that wrote a completion
    of the student's and those that learn it), ``bytes_per_token`` (received for each scored token),
    ``teacher_tokens_per_second`` (scored, of all ranks), ``teacher_cache_hits`` (share of the
    answers looked up that the cache held), ``teacher_cache_corrupt`` (number of damaged ones,
    requested again) and ``skipped_steps`` (number of steps that were not finite; if any).

    Of a step and rank, in seconds that add up to ``seconds_step``: ``seconds_teacher`` (waiting for
    it), ``seconds_generating``, ``seconds_syncing`` (weights to an engine elsewhere),
    ``seconds_forward_backward``, ``seconds_optimizer``, and what is left. ``stall_fraction`` is
    seconds_teacher / seconds_step. Evaluation and checkpoints are no part of a step.

    Of each teacher, where there are several, also ``train/divergence/NAME`` and
    ``teacher/top_k_mass/NAME`` over the tokens of its rows, ``teacher/tokens_per_second/NAME``, and
    ``time/teacher/NAME``, the seconds of a step and rank in which its answer was waited for.

    Args:
        teachers: the names of the teachers, the first one first; empty where there is only one.
    """

    _SUMS = (
        *_PER_TOKEN.values(),
        "tokens",
        "completions",
        "completion_tokens",
        "truncated",
        "on_policy",
        "student_completions",
        "staleness",
        "steps",
        *(f"seconds_{name}" for name in ACTIVITIES),
        "bytes",
        "scored_tokens",
        "looked_up",
        "found",
        "corrupt",
        "positions",
        "padding",
    )

    def __init__(self, teachers: Sequence[str] = ()) -> None:
        self._teachers = teachers
        self._names = (
            *self._SUMS,
            *(f"{name}/{teacher}" for teacher in teachers for name in _OF_EACH),
        )
        self._sums: dict[str, float | torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        self._sums = dict.fromkeys(self._names, 0.0)
        self._staleness_max = 0  # the same on all ranks
        self._skipped = 0  # the same on all ranks

    def add(self, name: str, amount: float | torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + amount

    def add_seconds(self, name: str, seconds: float) -> None:
        self.add(f"seconds_{name}", seconds)

    def add_traffic(self, teacher: str, received: int, scored: int) -> None:
        """Add the bytes and the scored tokens that a teacher sent."""
        self.add("bytes", received)
        self.add("scored_tokens", scored)
        if self._teachers:
            self.add(f"scored_tokens/{teacher}", scored)

    def add_wait(self, teacher: str | None, seconds: float) -> None:
        """Add the seconds of a wait for a teacher, the first one for None."""
        if self._teachers:
            self.add(f"waited/{teacher or self._teachers[0]}", seconds)

    def add_statistics(
        self, statistics: SparseStatistics, taught: Sequence[tuple[str | None, int]] = ()
    ) -> None:
        """Add the per-token statistics of one micro-batch; they stay on the device.

        Args:
            taught: (teacher's name, positions) of each sample in turn.
        """
        for name, span in spans_of(taught, self._teachers[0]) if self._teachers else ():
            self.add(f"tokens/{name}", span.stop - span.start)
            self.add(f"divergence/{name}", statistics.divergence[span].sum())
            self.add(f"mass/{name}", statistics.teacher_support_mass[span].sum())
        for field in fields(statistics):
            if field.name in _PER_TOKEN:
                self.add(_PER_TOKEN[field.name], getattr(statistics, field.name).sum())
        self.add("tokens", len(statistics.divergence))

    def add_step(self, samples: Sequence[Sample], *, step: int, on_policy: bool) -> None:
        """Add the samples of a step, which is counted from 0."""
        self.add("steps", 1)
        self.add("on_policy", on_policy)
        self.add("completions", len(samples))
        self.add("truncated", sum(sample.truncated for sample in samples))
        self.add("completion_tokens", sum(len(sample.completion_mask) for sample in samples))
        stale = [step - s.weight_version for s in samples if s.weight_version is not None]
        self.add("student_completions", len(stale))
        self.add("staleness", sum(stale))
        self._staleness_max = max([self._staleness_max, *stale])

    def skip_step(self) -> None:
        """Count a step that changes no weights, as its loss or gradient is not finite."""
        self._skipped += 1

    def add_inputs(self, positions: int, tokens: int) -> None:
        """Add a micro-batch of ``positions`` hidden states, ``tokens`` of them for real tokens."""
        self.add("positions", positions)
        self.add("padding", positions - tokens)

    def drain(
        self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], *, with_teacher: bool
    ) -> dict[str, float]:
        """Return the averages of the window and begin a new one; empty without a step."""
        sums = [float(self._sums[name]) for name in self._names]
        values = torch.tensor(sums, dtype=torch.float64)
        staleness_max, skipped = self._staleness_max, self._skipped
        self.reset()
        ranks = float(sum_over_ranks(torch.ones(1)))
        total = dict(zip(self._names, sum_over_ranks(values).tolist(), strict=True))
        if not total["steps"] or not total["tokens"]:
            return {}
        logs: dict[str, float] = {}
        logs["completion_length"] = total["completion_tokens"] / total["completions"]
        logs["truncated"] = total["truncated"] / total["completions"]
        logs["padding_fraction"] = total["padding"] / total["positions"]
        if skipped:
            logs["skipped_steps"] = skipped
        # Activities exclude one another, "step" being the rest, so their sum is the whole step.
        seconds = {name: total[f"seconds_{name}"] / total["steps"] for name in ACTIVITIES}
        whole = seconds["step"] = sum(seconds.values())
        for name in ACTIVITIES if with_teacher else _WITHOUT_TEACHER:
            logs[f"seconds_{name}"] = seconds[name]
        if with_teacher:
            per_token = {name: total[name] / total["tokens"] for name in _PER_TOKEN.values()}
            logs |= {name: mean for name, mean in per_token.items() if math.isfinite(mean)}
            logs["on_policy"] = total["on_policy"] / total["steps"]
            logs["stall_fraction"] = seconds["teacher"] / whole if whole else 0.0
            if total["student_completions"]:
                logs["staleness"] = total["staleness"] / total["student_completions"]
                logs["staleness_max"] = staleness_max
            if total["scored_tokens"]:
                logs["bytes_per_token"] = total["bytes"] / total["scored_tokens"]
            if total["looked_up"]:
                logs["teacher_cache_hits"] = total["found"] / total["looked_up"]
                logs["teacher_cache_corrupt"] = total["corrupt"]
            if whole:
                elapsed = whole * total["steps"] / ranks
                logs["teacher_tokens_per_second"] = total["scored_tokens"] / elapsed
                for teacher in self._teachers:
                    logs |= _of_one(teacher, total, elapsed)
        return logs


def spans_of(
    taught: Sequence[tuple[str | None, int]], first_teacher: str
) -> Iterator[tuple[str, slice]]:
    """Yield the teacher's name and the positions of each sample in turn.

    Args:
        taught: (teacher's name, positions) of each sample; None is the first teacher.
    """
    begin = 0
    for teacher, count in taught:
        yield teacher or first_teacher, slice(begin, begin + count)
        begin += count


def _of_one(teacher: str, total: Mapping[str, float], elapsed: float) -> dict[str, float]:
    """Return what is logged of one of several teachers, from the sums of a window."""
    logs = {
        f"teacher/tokens_per_second/{teacher}": total[f"scored_tokens/{teacher}"] / elapsed,
        f"time/teacher/{teacher}": total[f"waited/{teacher}"] / total["steps"],
    }
    tokens = total[f"tokens/{teacher}"]
    if tokens:  # a window may have none of its rows
        logs[f"train/divergence/{teacher}"] = total[f"divergence/{teacher}"] / tokens
        logs[f"teacher/top_k_mass/{teacher}"] = total[f"mass/{teacher}"] / tokens
    return logs
