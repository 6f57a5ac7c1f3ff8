"""Parts of much work; what is asked in halves is tested with the client, in test_teacher.py."""

from hypothesis import given
from hypothesis import strategies as st

from student_trainer.teacher.split import split


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_parts_are_as_long_as_they_can_be(costs, room):
    parts = split(costs, room)
    assert [index for first, last in parts for index in range(first, last)] == list(
        range(len(costs))
    )

    def fits(first, last):
        return all(sum(cost[unit] for cost in costs[first:last]) <= room[unit] for unit in range(2))

    for first, last in parts:
        assert last - first == 1 or fits(first, last)
        assert last == len(costs) or not fits(first, last + 1)
