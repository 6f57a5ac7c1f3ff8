"""Shares of several datasets in an epoch."""

from collections import Counter

import numpy as np
import pytest

from shared.errors import DatasetError
from student_trainer.data.mixture import Mixture, mix
from student_trainer.data.sample import Example


def examples_of(*rows, turns=1):
    ids = np.zeros(1, np.uint32)
    return [
        Example(row + (turn << 32), f"row {row}", ids, None, None, "")
        for row in rows
        for turn in range(turns)
    ]


def mixed(sizes, weights, *, rows=None, seed=0, turns=1):
    rows = range(sum(sizes)) if rows is None else rows
    names = [f"d{number}" for number in range(len(sizes))]
    return mix(examples_of(*rows, turns=turns), Mixture(names, sizes, weights, seed))


def test_without_weights_each_row_comes_once_in_its_place():
    examples, told = mixed([3, 2], None)
    assert [e.index for e in examples] == [0, 1, 2, 3, 4]
    assert told == [
        "d0: 3 rows an epoch (60.0%), each of its 3 rows once",
        "d1: 2 rows an epoch (40.0%), each of its 2 rows once",
    ]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [([4, 4], [2, 1], [8, 4]), ([10, 3], [1, 1], [10, 10]), ([9, 3], [3, 1], [9, 3]),
     ([2, 5, 1], [1, 1, 2], [5, 5, 10]), ([7, 2], [0.7, 0.2], [7, 2])],
)  # fmt: skip
def test_shares_are_those_of_the_weights_and_no_row_is_left_out(sizes, weights, expected):
    examples, told = mixed(sizes, weights)
    counts = Counter(example.name for example in examples)
    ends = np.cumsum([0, *sizes])
    for number, wanted in enumerate(expected):
        of_dataset = [counts[f"row {row}"] for row in range(ends[number], ends[number + 1])]
        assert sum(of_dataset) == wanted
        assert max(of_dataset) - min(of_dataset) <= 1
        assert min(of_dataset) >= 1
        assert told[number].startswith(f"d{number}: {wanted} rows an epoch (")
    assert len({example.index for example in examples}) == len(examples)  # draws of their own


def test_repeats_are_told_and_depend_on_the_seed_alone():
    examples, told = mixed([10, 3], [1, 1])
    assert told[1].endswith("each of its 3 rows 3 times, 1 of them once more")
    assert [e.index for e in examples] == [e.index for e in mixed([10, 3], [1, 1])[0]]
    chosen = {tuple(e.name for e in mixed([10, 3], [1, 1], seed=s)[0]) for s in range(8)}
    assert len(chosen) > 1


def test_turns_of_a_row_stay_together_and_count_as_one_row():
    examples, _ = mixed([2, 4], [1, 1], turns=2)
    assert Counter(e.name for e in examples) == {
        "row 0": 4, "row 1": 4, **{f"row {row}": 2 for row in range(2, 6)},
    }  # fmt: skip
    assert len({example.index for example in examples}) == 16


def test_rows_that_were_left_out_do_not_count_and_none_left_is_an_error():
    examples, _ = mixed([3, 3], [1, 1], rows=[0, 2, 3, 4, 5])
    assert sum(e.name in ("row 0", "row 2") for e in examples) == 3
    with pytest.raises(DatasetError, match="every row of d1 is left out"):
        mixed([3, 3], [1, 1], rows=[0, 1, 2])
