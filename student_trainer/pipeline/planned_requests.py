"""The requests to the teacher that do not depend on the student, so they are known beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_trainer.data.sample import Example
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.teacher.base import Sequences, Teacher
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.named import Teachers

_IN_FLIGHT = 16


@dataclass(frozen=True)
class PlannedRequests:
    """The completions that one teacher scores, and the prompts that it completes and scores.

    Attributes:
        teacher: the name of the teacher.
        method: settings of the distillation.
        sequences: the dataset's completions to score.
        prompts: training prompts that the teacher completes (SeqKD).
        held_out_prompts: held-out prompts without a completion; the teacher's greedy one is used.
    """

    teacher: str
    method: DistillationConfig
    sequences: Sequences
    prompts: list[NDArray[np.uint32]]
    held_out_prompts: list[NDArray[np.uint32]]

    def __len__(self) -> int:
        return len(self.sequences) + len(self.prompts) + len(self.held_out_prompts)


def planned_requests(
    names: Sequence[str],
    method: DistillationConfig,
    train: Sequence[Example],
    held_out: Sequence[Example] | None,
) -> list[PlannedRequests]:
    """Return the off-policy requests to each teacher for the examples of training and evaluation.

    Args:
        names: of the teachers; the first is that of examples which name none.
    """
    return [
        _planned_for(
            name,
            method,
            [example for example in train if (example.teacher or names[0]) == name],
            [example for example in held_out or [] if (example.teacher or names[0]) == name],
        )
        for name in names
    ]


def _planned_for(
    name: str, method: DistillationConfig, train: Sequence[Example], held_out: Sequence[Example]
) -> PlannedRequests:
    scored = [] if method.seq_kd else list(train)
    scored += [example for example in held_out if example.sample is not None]
    return PlannedRequests(
        name,
        method,
        [e.sequence_of_teacher(e.sample) for e in scored if e.sample is not None],
        [example.prompt_of_teacher for example in train] if method.seq_kd else [],
        [example.prompt_of_teacher for example in held_out if example.sample is None],
    )


def require_answers(teachers: Teachers, planned: Sequence[PlannedRequests]) -> None:
    """Wait for each teacher whose cache lacks some of the planned answers."""
    for requests in planned:
        teacher = teachers.of(requests.teacher)
        if isinstance(teacher, CachedTeacher):
            teacher.require(*count_missing(teacher, requests))


def count_missing(teacher: CachedTeacher, planned: PlannedRequests) -> tuple[int, int]:
    """Return how many planned requests the cache cannot answer, and how many there are."""
    found = teacher.count_scores(planned.sequences, planned.method.scoring())
    temperature = planned.method.seq_kd_temperature
    found += teacher.count_completions(planned.prompts, planned.method.sampling(temperature))
    found += teacher.count_completions(planned.held_out_prompts, planned.method.sampling(0.0))
    return len(planned) - found, len(planned)


def send_all(teacher: Teacher, planned: PlannedRequests, *, size: int) -> Iterator[int]:
    """Send all planned requests, ``size`` at a time, and yield the number answered by each."""
    in_flight: deque[tuple[Future[Any], int]] = deque()
    for answer, count in _submit_all(teacher, planned, size):
        in_flight.append((answer, count))
        if len(in_flight) == _IN_FLIGHT:
            yield _wait_for_answer(*in_flight.popleft())
    for answer, count in in_flight:
        yield _wait_for_answer(answer, count)


def _submit_all(
    teacher: Teacher, planned: PlannedRequests, size: int
) -> Iterator[tuple[Future[Any], int]]:
    for first in range(0, len(planned.sequences), size):
        sequences = planned.sequences[first : first + size]
        yield teacher.submit(teacher.score, sequences, planned.method.scoring()), len(sequences)
    temperature = planned.method.seq_kd_temperature
    for everything, sampling in (
        (planned.prompts, planned.method.sampling(temperature)),
        (planned.held_out_prompts, planned.method.sampling(0.0)),
    ):
        for first in range(0, len(everything), size):
            prompts = everything[first : first + size]
            yield teacher.submit(teacher.generate, prompts, sampling), len(prompts)


def _wait_for_answer(answer: Future[Any], count: int) -> int:
    answer.result()
    return count
