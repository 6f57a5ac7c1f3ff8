"""A stream is the same however often it is begun again, and holds little of itself."""

import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from shared.errors import ConfigurationError, DatasetError, RowTooLongError
from student_trainer.data.sample import Example
from student_trainer.data.stream import ExampleStream, RowStream, StreamOrder


def source(name, count):
    return lambda: ((f"{name} {n}", {"n": n}) for n in range(count))


def rows_of(*counts, weights=None, seed=0, buffer=4):
    names = [f"d{number}" for number in range(len(counts))]
    sources = [source(name, count) for name, count in zip(names, counts, strict=True)]
    return RowStream(names, sources, weights, seed, buffer)


def make(number, where, row):
    """Three turns of every fifth row; every seventh is too long."""
    if row["n"] % 7 == 6:
        raise RowTooLongError(f"{where} is too long")
    ids = np.zeros(1, np.uint32)
    turns = 3 if row["n"] % 5 == 4 else 1
    return [Example(number, f"{where} {t}", ids, None, None, "") for t in range(turns)]


def stream(rows, rank=0, world=1, **options):
    return ExampleStream(rows, make, length=10**6, skip=True, rank=rank, world=world, **options)


def names(examples):
    return [example.name for example in examples]


def taken(rows, count):
    return [where for where, _ in islice(rows, count)]


def test_each_pass_has_every_row_once_and_an_order_of_its_own():
    rows = taken(rows_of(20), 60)
    passes = [rows[first : first + 20] for first in (0, 20, 40)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert len({tuple(one) for one in [*passes, sorted(passes[0])]}) == 4
    assert rows == taken(rows_of(20), 60)
    assert rows != taken(rows_of(20, seed=1), 60)


def test_weights_are_shares_and_a_small_dataset_begins_again():
    rows = taken(rows_of(1000, 10, weights=[3, 1]), 4000)
    share = sum(where.startswith("d1") for where in rows) / len(rows)
    assert abs(share - 0.25) < 0.03
    repeats = Counter(where for where in rows if where.startswith("d1"))
    assert len(repeats) == 10
    assert max(repeats.values()) - min(repeats.values()) <= 1
    assert {where[:2] for where in taken(rows_of(3, 2), 5)} == {"d0", "d1"}


def test_ranks_share_the_rows():
    def one(number, where, row):
        return [Example(number, where, np.zeros(1, np.uint32), None, None, "")]

    ranks = [
        ExampleStream(rows_of(30), one, length=99, skip=False, rank=rank, world=3)[:10]
        for rank in range(3)
    ]
    assert sorted(names(e for rank in ranks for e in rank)) == sorted(taken(rows_of(30), 30))
    assert sorted(e.index for rank in ranks for e in rank) == list(range(30))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("weights", [None, [1, 2]])
@pytest.mark.parametrize("position", [0, 1, 2, 17, 40, 91])
def test_a_stream_goes_on_at_any_position_as_if_it_had_never_stopped(world, weights, position):
    for rank in range(world):
        whole = stream(rows_of(13, 8, weights=weights), rank, world)
        expected = whole[:120]
        state = whole.state(position)
        again = stream(rows_of(13, 8, weights=weights), rank, world)
        _ = again[:3]  # what is looked at before it is restored
        again.restore(state)
        found = [again[i] for i in range(position, 120)]
        assert names(found) == names(expected[position:])
        assert [e.index for e in found] == [e.index for e in expected[position:]]


def test_another_stream_is_not_gone_on_with():
    state = stream(rows_of(13)).state(5)
    for other, told in (
        (stream(rows_of(13, seed=1)), "seed 0, and this one has 1"),
        (stream(rows_of(13, buffer=5)), "shuffle_buffer_size 4, and this one has 5"),
        (stream(rows_of(13), 0, 2), "processes 1, and this one has 2"),
        (stream(rows_of(13, 2)), "dataset_name"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            other.restore(state)


def test_examples_are_given_up_when_told(caplog):
    examples = stream(rows_of(100))
    _ = examples[:50]
    examples.forget(before=40)
    assert names([examples[40]]) == names(stream(rows_of(100))[40:41])
    with pytest.raises(KeyError):
        examples[39]
    assert "rows so far are left out: too long" in caplog.text


def test_memory_does_not_grow_with_the_rows():
    def big():
        return ((f"row {n}", {"n": 0, "text": "x" * 10_000 + str(n)}) for n in range(20_000))

    examples = stream(RowStream(["big"], [big], None, 0, 100))

    def peak(first, last):
        tracemalloc.reset_peak()
        for position in range(first, last):
            _ = examples[position]
            examples.forget(before=position)
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    early, late = peak(0, 500), peak(500, 19_000)
    tracemalloc.stop()
    assert early > 100 * 10_000  # the buffer
    assert late < early + 200_000  # of 185 MB of text that passed by
    assert late < 2_000_000


def test_an_empty_dataset_and_one_of_long_rows_end_with_a_word():
    with pytest.raises(DatasetError, match="d0 holds no rows"):
        next(iter(rows_of(0)))
    with pytest.raises(DatasetError, match="d1 holds no rows"):
        rows_of(3, 0).head(5)
    assert [where for where, _ in rows_of(9, 2).head(3)] == ["d0 0", "d0 1", "d0 2", "d1 0", "d1 1"]
    long = RowStream(["d"], [lambda: iter([("d 6", {"n": 6})])], None, 0, 4)
    for world in (1, 3):
        with pytest.raises(DatasetError, match="rows in a row are too long"):
            stream(long, 0, world)[0]
    with pytest.raises(RowTooLongError, match="d 6 is too long"):
        ExampleStream(long, make, length=1, skip=False)[0]


def test_a_step_takes_the_positions_behind_those_of_the_step_before():
    order = StreamOrder(batch_size=2, accumulation=3, steps=4)
    assert order.micro_batches(0) == [[0, 1], [2, 3], [4, 5]]
    assert order.micro_batches(1) == [[6, 7], [8, 9], [10, 11]]
    assert (order.first_of(2), order.last_of_epoch(0), order.steps_per_epoch) == (12, 3, 4)


def test_examples_are_checked_when_their_rows_are_read_and_those_that_were_read_before():
    checked = []
    one = stream(rows_of(10))
    first = one[0]
    one.check_each(lambda example: checked.append(example.name))
    assert checked == [first.name]
    rest = [one[index] for index in range(1, 4)]
    assert checked[:4] == names([first, *rest])

    def refuse(example):
        raise DatasetError(f"{example.name}: too long for its teacher")

    one.check_each(lambda example: None)
    one._check = refuse
    with pytest.raises(DatasetError, match="too long for its teacher"):
        one[len(checked) + 5]
