"""The check that a teacher gives the same scores twice, because random scores cannot be learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.errors import TeacherAnswerError
from shared.sparse import SparseLogprobs
from student_trainer.data.sample import Example
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.teacher.base import Teacher

_ROWS = 2
_TOKENS = 512  # of each row at most


def check_repeats(
    teacher: Teacher, examples: Sequence[Example], method: DistillationConfig, *, tolerance: float
) -> None:
    """Score the first rows twice and compare, unless the teacher itself is not connected.

    Probabilities are compared and not their logs, because rounding moves the log of an improbable
    token by more than any fault moves the loss.

    Args:
        tolerance: largest allowed change of the probability of a next token, or of the token at any
            rank of the top-k.

    Raises:
        TeacherAnswerError: a probability changed by more; names both.
    """
    if not teacher.connected:
        return
    examples = examples[:_ROWS]
    sequences = [(_tokens(example), 1) for example in examples]  # all tokens but the first
    first, second = (teacher.live.score(sequences, method.scoring()) for _ in range(2))
    teacher.take_traffic()  # drop these counts, which are not of a training step
    for example, a, b in zip(examples, first, second, strict=True):
        once, again = _probabilities(a), _probabilities(b)
        change = np.abs(once - again)  # [T, 1 + k]
        row, column = np.unravel_index(change.argmax(), change.shape)
        if change[row, column] > tolerance:
            which = f"most probable token number {column}" if column else "next token"
            raise TeacherAnswerError(
                f"the teacher scored {example.name} twice, and gave the {which} after "
                f"token {row + 1} the probability {once[row, column]:.4f}, then "
                f"{again[row, column]:.4f}; --teacher_repeat_tolerance is {tolerance:g}. Look for "
                "dropout, a kernel that races, or replicas that differ; raise it if this teacher "
                "is meant to be so noisy"
            )


def _tokens(example: Example) -> NDArray[np.uint32]:
    ids = example.prompt_of_teacher
    if example.sample is not None:
        ids, _ = example.sequence_of_teacher(example.sample)
    return ids[:_TOKENS] if len(ids) > 1 else np.repeat(ids, 2)  # a score needs a token before it


def _probabilities(scores: SparseLogprobs) -> NDArray[np.float64]:
    """Return probabilities [T, 1 + k] of the next token, and of the most probable ones by rank."""
    logprobs = [scores.next_token_logprob[:, None], scores.logprobs]
    return np.exp(np.concatenate(logprobs, axis=1, dtype=np.float64))
