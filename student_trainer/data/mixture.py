"""The mixture of several datasets in one epoch, each with its share of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shared.errors import DatasetError
from student_trainer.data.examples import row_of
from student_trainer.data.sample import Example


@dataclass(frozen=True)
class Mixture:
    """The datasets of a concatenation and their shares of an epoch.

    Attributes:
        names: names of the datasets, for messages.
        sizes: number of rows of each dataset.
        weights: relative shares of the rows of an epoch; None for each row once.
        seed: seed that chooses the rows which are repeated once more than others.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    weights: Sequence[float] | None
    seed: int


def mix(examples: Sequence[Example], mixture: Mixture) -> tuple[list[Example], list[str]]:
    """Return the examples of an epoch, and a message about each dataset.

    As in `datasets.interleave_datasets` with ``all_exhausted``, no row is left out: the dataset
    that is largest for its weight is used once, and rows of the others are repeated until the
    shares are right. A repeated example has its own index.

    Raises:
        DatasetError: every row of a dataset is left out.
    """
    total = sum(mixture.sizes)
    groups: list[dict[int, list[Example]]] = [{} for _ in mixture.sizes]  # row -> its examples
    ends = [sum(mixture.sizes[: number + 1]) for number in range(len(mixture.sizes))]
    for example in examples:
        row = row_of(example)
        number = next(n for n, end in enumerate(ends) if row < end)
        groups[number].setdefault(row, []).append(example)
    for name, group in zip(mixture.names, groups, strict=True):
        if not group:
            raise DatasetError(f"every row of {name} is left out: too long; drop the dataset")
    weights = mixture.weights or [float(len(group)) for group in groups]
    largest = max(len(group) / weight for group, weight in zip(groups, weights, strict=True))
    mixed: list[Example] = []
    wanted = [max(len(g), round(w * largest)) for g, w in zip(groups, weights, strict=True)]
    told = []
    for number, (group, count) in enumerate(zip(groups, wanted, strict=True)):
        rows = list(group)
        whole, rest = divmod(count, len(rows))
        generator = torch.Generator().manual_seed(mixture.seed + number)
        extra = torch.randperm(len(rows), generator=generator)[:rest].tolist()
        turns = [(repeat, row) for repeat in range(whole) for row in rows]
        turns += [(whole, rows[place]) for place in sorted(extra)]
        mixed += [
            replace(example, index=example.index + repeat * total)
            for repeat, row in turns
            for example in group[row]
        ]
        often = "once" if whole == 1 else f"{whole} times"
        if rest:
            often += f", {rest} of them once more"
        told.append(
            f"{mixture.names[number]}: {count} rows an epoch ({count / sum(wanted):.1%}), each of "
            f"its {len(rows)} rows {often}"
        )
    return mixed, told
