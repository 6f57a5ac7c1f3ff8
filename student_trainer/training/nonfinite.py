"""The guard against steps that are not finite: it stops or skips them and keeps their batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from shared.errors import NonFiniteError
from shared.sparse import SparseLogprobs
from student_trainer.pipeline.prefetched import (
    samples_from_arrays,
    samples_to_arrays,
    split_by_lengths,
)
from student_trainer.pipeline.targets import ScoredSample
from student_trainer.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

_SCORES = ("token_ids", "logprobs", "next_token_logprob", "tail_logprob", "requested_logprobs")


class NonFiniteGuard:
    """A guard before the optimizer: no weights learn from a step that is not finite.

    Args:
        folder: keeps the batch of a step that ends the run.
        ranks: stop or skip alike.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        self._ranks = ranks
        self._loss: float | torch.Tensor = 0.0
        self._batch: list[list[ScoredSample]] = []

    def begin_step(self) -> None:
        """Forget the batch and the loss of the step before."""
        self._loss, self._batch = 0.0, []

    @property
    def began(self) -> bool:
        """Return whether a micro-batch of this step was learned already."""
        return bool(self._batch)

    def add_batch(self, scored: list[ScoredSample]) -> None:
        """Keep a micro-batch of this step."""
        self._batch.append(scored)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss to that of this step; it stays on its device."""
        self._loss = self._loss + loss.detach()

    def check(self, step: int, grad_norm: Any, *, skip: bool) -> bool:
        """Return whether all ranks may learn from the step.

        Args:
            step: counted from 1.
            grad_norm: of the step's gradient; None where a loss scaler checks it.
            skip: return False for a step that is not finite, instead of an error.

        Raises:
            NonFiniteError: names the file that keeps this rank's batch.
        """
        loss, norm = float(self._loss), 0.0
        if grad_norm is not None:
            norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        if not self._ranks.any(not (math.isfinite(loss) and math.isfinite(norm))):
            return True
        rank = self._ranks.rank
        found = f"step {step}: the loss is {loss} and the norm of the gradient {norm} (rank {rank})"
        if skip:
            logger.warning("%s; the step is skipped", found)
            return False
        file = self._folder / f"nonfinite-step{step}-rank{rank}.npz"
        try:
            save_batch(file, self._batch)
            kept = f"Its batch is in {file}, for student_trainer.training.nonfinite.load_batch"
        except OSError as error:
            kept = f"Its batch could not be kept in {file}: {error.strerror or error}"
        raise NonFiniteError(
            f"{found}. {kept}; no checkpoint was written after it. Look for rows that are unlike "
            "the others, or lower --learning_rate; --nonfinite skip with --resume_from_checkpoint "
            "auto leaves it out"
        )


def save_batch(path: Path, micro_batches: Sequence[Sequence[ScoredSample]]) -> None:
    """Write samples and scores as plain arrays (.npz), laid end to end; see `load_batch`.

    ``teacher_*``, the fields of `SparseLogprobs`, and ``requested_token_ids`` [sum of T, m] hold
    one entry for each of a sample's T completion positions, samples concatenated; absent for SFT.
    ``teacher_name`` is empty for the first teacher, and ``teacher_prompt_ids`` holds the prompts
    that only a teacher saw, of ``teacher_prompt_length`` tokens each, 0 for none.
    """
    scored = [item for micro_batch in micro_batches for item in micro_batch]
    arrays: dict[str, Any] = {
        **samples_to_arrays([item.sample for item in scored]),
        "micro_batch": [len(micro_batch) for micro_batch in micro_batches],
        "sampled": [item.sampled for item in scored],
        "teacher_name": [item.teacher or "" for item in scored],
    }
    prompts = [
        np.zeros(0, np.uint32) if item.teacher_prompt_ids is None else item.teacher_prompt_ids
        for item in scored
    ]
    arrays["teacher_prompt_length"] = [len(prompt) for prompt in prompts]
    arrays["teacher_prompt_ids"] = np.concatenate(prompts)
    for name in _SCORES:
        values = [getattr(item.scores, name, None) for item in scored]
        present = [value for value in values if value is not None]  # all samples have it, or none
        if present:
            arrays[f"teacher_{name}"] = np.concatenate(present)
    requested = [item.requested for item in scored if item.requested is not None]
    if requested:
        arrays["requested_token_ids"] = np.concatenate(requested)
    np.savez(path, allow_pickle=False, **arrays)


def load_batch(path: Path) -> list[list[ScoredSample]]:
    """Return the micro-batches that `save_batch` wrote, of this version or an earlier one."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    samples = samples_from_arrays(arrays)
    rows = arrays["length"] - arrays["completion_start"]

    def of_each_sample(name: str) -> list[Any]:
        return split_by_lengths(arrays[name], rows) if name in arrays else [None] * len(samples)

    fields = {name: of_each_sample(f"teacher_{name}") for name in _SCORES}
    requested = of_each_sample("requested_token_ids")
    names = arrays.get("teacher_name", np.array([""] * len(samples))).tolist()
    lengths = arrays.get("teacher_prompt_length", np.zeros(len(samples), np.int64))
    prompts = split_by_lengths(arrays.get("teacher_prompt_ids", np.zeros(0, np.uint32)), lengths)
    scored = [
        ScoredSample(
            sample,
            SparseLogprobs(**{name: fields[name][i] for name in _SCORES})
            if "teacher_logprobs" in arrays
            else None,
            requested[i],
            sampled=bool(arrays["sampled"][i]),
            teacher=names[i] or None,
            teacher_prompt_ids=prompts[i] if len(prompts[i]) else None,
        )
        for i, sample in enumerate(samples)
    ]
    ends = np.cumsum(arrays["micro_batch"]).tolist()
    return [scored[first:last] for first, last in zip([0, *ends], ends, strict=False)]
