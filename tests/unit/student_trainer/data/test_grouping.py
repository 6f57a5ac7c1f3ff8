"""Every sample is in exactly one micro-batch, and like lengths are together."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.data.micro_batches import (
    assign_to_substeps,
    group_by_sizes,
    group_within_budget,
    split_to_count,
)

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=24)


def area(lengths, group):
    return len(group) * max(lengths[i] for i in group)


def assert_each_once(groups, lengths):
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)


@given(LENGTHS, st.integers(1, 6))
def test_micro_batches_keep_their_sizes_and_have_no_more_padding(lengths, size):
    lengths = (lengths * size)[: max(1, len(lengths) // size) * size]  # full micro-batches
    given_order = [list(range(i, i + size)) for i in range(0, len(lengths), size)]
    groups = group_by_sizes(lengths, [size] * len(given_order))
    assert_each_once(groups, lengths)
    assert [len(group) for group in groups] == [size] * len(given_order)
    assert sum(area(lengths, g) for g in groups) <= sum(area(lengths, g) for g in given_order)


def test_unequal_sizes_are_kept_longest_samples_first():
    assert group_by_sizes([3, 9, 5, 9, 1], [2, 2, 1]) == [[1, 3], [2, 0], [4]]


def test_shortest_first_keeps_those_of_equal_length_as_they_come():
    lengths = [3, 9, 5, 9, 1]
    assert group_by_sizes(lengths, [2, 2, 1], shortest_first=True) == [[4, 0], [2, 1], [3]]
    groups = group_within_budget(lengths, 18, packed=False, shortest_first=True)
    assert groups == [[4, 0, 2], [1, 3]]


@pytest.mark.parametrize("shortest_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@given(lengths=LENGTHS, budget=st.integers(1, 200))
def test_micro_batches_are_within_the_budget_or_of_one_long_sample(
    packed, shortest_first, lengths, budget
):
    groups = group_within_budget(lengths, budget, packed=packed, shortest_first=shortest_first)
    assert_each_once(groups, lengths)
    for group in groups:
        tokens = sum(lengths[i] for i in group) if packed else area(lengths, group)
        assert tokens <= budget or len(group) == 1


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), budget=st.integers(1, 90))
def test_there_are_no_fewer_micro_batches_of_neighbours_and_no_less_padding(lengths, budget):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs = []
    for count in range(len(order)):
        for cuts in combinations(range(1, len(order)), count):
            bounds = [0, *cuts, len(order)]
            groups = [order[a:b] for a, b in pairwise(bounds)]
            if all(area(lengths, g) <= budget or len(g) == 1 for g in groups):
                costs.append((len(groups), sum(area(lengths, g) for g in groups)))
    found = group_within_budget(lengths, budget, packed=False)
    assert (len(found), sum(area(lengths, g) for g in found)) == min(costs)


@given(LENGTHS, st.integers(1, 200), st.data())
def test_splitting_gives_the_number_asked_for_and_only_divides(lengths, budget, data):
    groups = group_within_budget(lengths, budget, packed=False)
    count = data.draw(st.integers(len(groups), len(lengths)))
    split = split_to_count(groups, count)
    assert len(split) == count
    assert_each_once(split, lengths)
    assert all(any(set(part) <= set(group) for group in groups) for part in split)


def test_more_micro_batches_than_samples_are_refused():
    with pytest.raises(ValueError, match="another rank needs 3 micro-batches, here are 2 samples"):
        split_to_count([[0, 1]], 3)


@pytest.mark.parametrize(
    ("micro_batches", "expected"),
    [
        ("abc", [["a"], ["b"], ["c"]]),
        ("abcde", [["a"], ["b"], ["c", "d", "e"]]),
        ("ab", [["a"], [], ["b"]]),
        ("a", [[], [], ["a"]]),
    ],
)
def test_only_the_last_substep_has_several_micro_batches_and_always_one(micro_batches, expected):
    assert assign_to_substeps(list(micro_batches), 3) == expected
