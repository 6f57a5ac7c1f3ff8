"""The batch of a step whose loss or gradient was not finite, in a file, to be looked at again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.sparse import SparseLogprobs
from student_trainer.pipeline.prefetched import (
    samples_from_arrays,
    samples_to_arrays,
    split_by_lengths,
)
from student_trainer.pipeline.targets import ScoredSample

_SCORES = ("token_ids", "logprobs", "next_token_logprob", "tail_logprob", "requested_logprobs")


def save_batch(path: Path, micro_batches: Sequence[Sequence[ScoredSample]]) -> None:
    """Write samples and scores as plain arrays (.npz), laid end to end; see `load_batch`.

    Of a sample's T completion rows, all samples' one after another: ``teacher_*``, the fields of
    `SparseLogprobs`, and ``requested_token_ids`` [sum of T, m]; none of them for SFT.
    """
    scored = [item for micro_batch in micro_batches for item in micro_batch]
    arrays: dict[str, Any] = {
        **samples_to_arrays([item.sample for item in scored]),
        "micro_batch": [len(micro_batch) for micro_batch in micro_batches],
        "sampled": [item.sampled for item in scored],
    }
    for name in _SCORES:
        values = [getattr(item.scores, name, None) for item in scored]
        present = [value for value in values if value is not None]  # of all or of none
        if present:
            arrays[f"teacher_{name}"] = np.concatenate(present)
    requested = [item.requested for item in scored if item.requested is not None]
    if requested:
        arrays["requested_token_ids"] = np.concatenate(requested)
    np.savez(path, allow_pickle=False, **arrays)


def load_batch(path: Path) -> list[list[ScoredSample]]:
    """The micro-batches that `save_batch` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    samples = samples_from_arrays(arrays)
    rows = arrays["length"] - arrays["completion_start"]

    def of_each_sample(name: str) -> list[Any]:
        return split_by_lengths(arrays[name], rows) if name in arrays else [None] * len(samples)

    fields = {name: of_each_sample(f"teacher_{name}") for name in _SCORES}
    requested = of_each_sample("requested_token_ids")
    scored = [
        ScoredSample(
            sample,
            SparseLogprobs(**{name: fields[name][i] for name in _SCORES})
            if "teacher_logprobs" in arrays
            else None,
            requested[i],
            sampled=bool(arrays["sampled"][i]),
        )
        for i, sample in enumerate(samples)
    ]
    ends = np.cumsum(arrays["micro_batch"]).tolist()
    return [scored[first:last] for first, last in zip([0, *ends], ends, strict=False)]
