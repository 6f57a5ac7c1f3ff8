"""What one row becomes: token ids and which of them are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Source = Literal["dataset", "teacher", "student"]


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        token_ids: [L] uint32, prompt and completion.
        completion_start: position of the first completion token.
        completion_mask: [T] bool, T = L − completion_start; True where the token is learned.
        source: who wrote the completion.
        truncated: the completion was cut by a length limit.
        weight_version: optimizer steps behind the weights that wrote it, when the student did.
    """

    token_ids: NDArray[np.uint32]
    completion_start: int
    completion_mask: NDArray[np.bool_]
    source: Source
    truncated: bool = False
    weight_version: int | None = None

    @property
    def prompt_ids(self) -> NDArray[np.uint32]:
        return self.token_ids[: self.completion_start]

    @property
    def completion_ids(self) -> NDArray[np.uint32]:
        return self.token_ids[self.completion_start :]


@dataclass(frozen=True)
class Example:
    """One row: the prompt, the dataset's own completion if it has one, and its checker.

    Attributes:
        index: position in the dataset; part of the key of everything random about the row.
        name: file and line, or row number, for messages.
        prompt_ids: [P] uint32, what a completion is generated for.
        sample: prompt and completion of the dataset, or None for a bare prompt.
        checker: how to tell whether a completion is right, as `evaluation.checkers` reads it.
        prompt: the prompt as text, for reports.
        notes: what the chat template did to the row that a user should know of.
    """

    index: int
    name: str
    prompt_ids: NDArray[np.uint32]
    sample: Sample | None
    checker: dict[str, Any] | None
    prompt: str
    notes: tuple[str, ...] = ()


def completed(
    example: Example,
    completion_ids: NDArray[np.uint32],
    source: Source,
    *,
    truncated: bool,
    weight_version: int | None = None,
) -> Sample:
    """The example's prompt with a generated completion, all of which is learned."""
    return Sample(
        token_ids=np.concatenate([example.prompt_ids, completion_ids.astype(np.uint32)]),
        completion_start=len(example.prompt_ids),
        completion_mask=np.ones(len(completion_ids), dtype=bool),
        source=source,
        truncated=truncated,
        weight_version=weight_version,
    )
