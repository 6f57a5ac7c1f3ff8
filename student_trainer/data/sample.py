"""The tokenized forms of a dataset row: `Sample`, which is learned, and `Example`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Source = Literal["dataset", "teacher", "student"]


@dataclass(frozen=True)
class Sample:
    """A sequence of token ids to learn from.

    Attributes:
        token_ids: [L] uint32, prompt and completion.
        completion_start: position of the first completion token.
        completion_mask: [T] bool, T = L − completion_start; True where the token is learned.
        source: the writer of the completion.
        truncated: the completion was cut by a length limit.
        weight_version: for a student's completion, the number of optimizer steps that the weights
            which wrote it had been trained for.
    """

    token_ids: NDArray[np.uint32]
    completion_start: int
    completion_mask: NDArray[np.bool_]
    source: Source
    truncated: bool = False
    weight_version: int | None = None

    def __repr__(self) -> str:
        prompt, completion = self.completion_start, len(self.token_ids) - self.completion_start
        cut = ", truncated" if self.truncated else ""
        return f"Sample({prompt} + {completion} tokens, by the {self.source}{cut})"

    @property
    def prompt_ids(self) -> NDArray[np.uint32]:
        return self.token_ids[: self.completion_start]

    @property
    def completion_ids(self) -> NDArray[np.uint32]:
        return self.token_ids[self.completion_start :]


@dataclass(frozen=True)
class Example:
    """A tokenized dataset row: its prompt, its own completion if it has one, and its checker.

    Attributes:
        index: number in the dataset; part of the key of everything random about the row.
        name: file and line, or row number, for messages.
        prompt_ids: [P] uint32, the prompt that a completion is generated for.
        sample: prompt and completion of the dataset, or None for a bare prompt.
        checker: the test of a completion's correctness, as `evaluation.checkers` reads it.
        prompt: the prompt as text, for reports.
        notes: changes that the chat template made to the row and a user should know of.
        teacher: the name of the teacher that it is learned from; None for the first one.
        teacher_prompt_ids: [P'] uint32, the prompt that the teacher sees in place of
            ``prompt_ids``; None where it sees the same.
        generation: the number of the student's completion, where a step has several of the prompt.
    """

    index: int
    name: str
    prompt_ids: NDArray[np.uint32]
    sample: Sample | None
    checker: dict[str, Any] | None
    prompt: str
    notes: tuple[str, ...] = ()
    teacher: str | None = None
    teacher_prompt_ids: NDArray[np.uint32] | None = None
    generation: int = 0

    @property
    def key(self) -> tuple[int, ...]:
        """The part of the key of a completion's random numbers that tells it within a step."""
        return (self.index, self.generation) if self.generation else (self.index,)

    @property
    def prompt_of_teacher(self) -> NDArray[np.uint32]:
        """The prompt [P'] that the teacher completes."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def sequence_of_teacher(self, sample: Sample) -> tuple[NDArray[np.uint32], int]:
        """Return what the teacher scores of one of this example's samples.

        That is (token_ids [L'], completion_start): its own prompt, and the same completion.
        """
        if self.teacher_prompt_ids is None:
            return sample.token_ids, sample.completion_start
        joined = np.concatenate([self.teacher_prompt_ids, sample.completion_ids])
        return joined, len(self.teacher_prompt_ids)


def completed(
    example: Example,
    completion_ids: NDArray[np.uint32],
    source: Source,
    *,
    truncated: bool,
    weight_version: int | None = None,
) -> Sample:
    """Return the example's prompt with a generated completion, whose tokens are all learned."""
    return Sample(
        token_ids=np.concatenate([example.prompt_ids, completion_ids.astype(np.uint32)]),
        completion_start=len(example.prompt_ids),
        completion_mask=np.ones(len(completion_ids), dtype=bool),
        source=source,
        truncated=truncated,
        weight_version=weight_version,
    )
