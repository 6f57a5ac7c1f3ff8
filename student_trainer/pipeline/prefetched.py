"""The file in which a checkpoint keeps batches started ahead, because their weights are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_trainer.data.sample import Sample


@dataclass(frozen=True)
class PrefetchedBatch:
    """A generation batch that is written and not yet learned.

    Attributes:
        step: step that will learn it, from 0.
        weight_version: number of optimizer steps of the weights that it was started with.
        on_policy: the student wrote the completions.
        examples: `Example.index` of each sample.
        samples: the samples, in that order.
        requested: proposed ids [T, m] of each sample; empty if none are proposed.
    """

    step: int
    weight_version: int
    on_policy: bool
    examples: list[int]
    samples: list[Sample]
    requested: list[NDArray[np.uint32]]


def save_prefetched(path: Path, batches: Sequence[PrefetchedBatch]) -> None:
    """Write the batches into an .npz file as plain arrays: concatenated token ids and lengths."""
    samples = [sample for batch in batches for sample in batch.samples]
    requested = [ids for batch in batches for ids in batch.requested]
    arrays: dict[str, Any] = {
        "step": [batch.step for batch in batches],
        "weight_version": [batch.weight_version for batch in batches],
        "on_policy": [batch.on_policy for batch in batches],
        "count": [len(batch.samples) for batch in batches],
        "example": [index for batch in batches for index in batch.examples],
        **samples_to_arrays(samples),
    }
    if requested:
        arrays["requested"] = np.concatenate(requested)  # [sum of T, m]
    np.savez(path, allow_pickle=False, **arrays)


def samples_to_arrays(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the samples as plain arrays, concatenated, as `samples_from_arrays` reads them."""
    return {
        "length": [len(sample.token_ids) for sample in samples],
        "completion_start": [sample.completion_start for sample in samples],
        "source": [sample.source for sample in samples],
        "truncated": [sample.truncated for sample in samples],
        "sample_version": [
            -1 if sample.weight_version is None else sample.weight_version for sample in samples
        ],
        "token_ids": np.concatenate([sample.token_ids for sample in samples]),
        "completion_mask": np.concatenate([sample.completion_mask for sample in samples]),
    }


def samples_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[Sample]:
    """Return the samples from the arrays of `samples_to_arrays`."""
    lengths, starts = arrays["length"], arrays["completion_start"]
    ids = split_by_lengths(arrays["token_ids"], lengths)
    masks = split_by_lengths(arrays["completion_mask"], lengths - starts)
    versions = arrays["sample_version"].tolist()
    return [
        Sample(
            ids[i], int(starts[i]), masks[i], str(arrays["source"][i]),  # type: ignore[arg-type]
            bool(arrays["truncated"][i]), None if versions[i] < 0 else versions[i],
        )
        for i in range(len(ids))
    ]  # fmt: skip


def load_prefetched(path: Path) -> list[PrefetchedBatch]:
    """Return the batches that `save_prefetched` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    samples = samples_from_arrays(arrays)
    counts = arrays["length"] - arrays["completion_start"]
    requested = split_by_lengths(arrays["requested"], counts) if "requested" in arrays else []
    batches, first = [], 0
    for step, version, on_policy, count in zip(
        *(arrays[name].tolist() for name in ("step", "weight_version", "on_policy", "count")),
        strict=True,
    ):
        last = first + count
        examples = arrays["example"][first:last].tolist()
        batches.append(
            PrefetchedBatch(
                step, version, on_policy, examples, samples[first:last], requested[first:last]
            )
        )
        first = last
    return batches


def split_by_lengths(joined: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Split concatenated arrays into parts of the given lengths."""
    return np.split(joined, np.cumsum(lengths)[:-1])
