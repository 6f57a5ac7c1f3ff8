"""What a run asks of its teacher that does not depend on the student: known beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_trainer.data.sample import Example
from student_trainer.pipeline.pipeline import Method
from student_trainer.teacher.base import Sequences, Teacher
from student_trainer.teacher.cache import CachedTeacher

_IN_FLIGHT = 16


@dataclass(frozen=True)
class Questions:
    """Completions to score, and prompts to complete and score.

    Attributes:
        prompts: of SeqKD.
        bare: held-out prompts without a completion; the teacher's greedy one is compared.
    """

    method: Method
    sequences: Sequences
    prompts: list[NDArray[np.uint32]]
    bare: list[NDArray[np.uint32]]

    def __len__(self) -> int:
        return len(self.sequences) + len(self.prompts) + len(self.bare)

    @property
    def score_options(self) -> dict[str, Any]:
        return {"top_k": self.method.top_k, "temperature": self.method.temperature}


def questions(
    method: Method, train: Sequence[Example], held_out: Sequence[Example] | None
) -> Questions:
    """What the rows of training and evaluation are asked off-policy."""
    scored = [] if method.seq_kd else list(train)
    scored += [example for example in held_out or [] if example.sample is not None]
    samples = [example.sample for example in scored if example.sample is not None]
    return Questions(
        method,
        [(sample.token_ids, sample.completion_start) for sample in samples],
        [example.prompt_ids for example in train] if method.seq_kd else [],
        [example.prompt_ids for example in held_out or [] if example.sample is None],
    )


def count_missing(teacher: CachedTeacher, asked: Questions) -> tuple[int, int]:
    """How many of the questions only the teacher itself can answer, and how many there are."""
    found = teacher.count_scores(asked.sequences, **asked.score_options)
    temperature = asked.method.seq_kd_temperature
    found += teacher.count_completions(asked.prompts, asked.method.sampling(temperature))
    found += teacher.count_completions(asked.bare, asked.method.sampling(0.0))
    return len(asked) - found, len(asked)


def ask_all(teacher: Teacher, asked: Questions, *, size: int) -> Iterator[int]:
    """Ask everything, ``size`` in a request; yields how many answers have come, as they come."""
    under_way: deque[tuple[Future[Any], int]] = deque()
    for answer, count in _submitted(teacher, asked, size):
        under_way.append((answer, count))
        if len(under_way) == _IN_FLIGHT:
            yield _finished(*under_way.popleft())
    for answer, count in under_way:
        yield _finished(answer, count)


def _submitted(teacher: Teacher, asked: Questions, size: int) -> Iterator[tuple[Future[Any], int]]:
    for first in range(0, len(asked.sequences), size):
        sequences = asked.sequences[first : first + size]
        yield teacher.submit(teacher.score, sequences, **asked.score_options), len(sequences)
    temperature = asked.method.seq_kd_temperature
    for everything, sampling in (
        (asked.prompts, asked.method.sampling(temperature)),
        (asked.bare, asked.method.sampling(0.0)),
    ):
        for first in range(0, len(everything), size):
            prompts = everything[first : first + size]
            yield teacher.submit(teacher.generate, prompts, sampling), len(prompts)


def _finished(answer: Future[Any], count: int) -> int:
    answer.result()
    return count
