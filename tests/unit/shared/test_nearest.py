"""The name that a wrong one was probably meant to be."""

import pytest

from shared.nearest import nearest


@pytest.mark.parametrize(
    ("name", "cutoff", "expected"),
    [
        ("bta", 0.6, "beta"),
        ("lmda", 0.6, "lmbda"),
        ("zzz", 0.6, None),
        ("lmda", 0.95, None),
        ("", 0.6, None),
    ],
)
def test_the_nearest_name_or_none_is_returned(name, cutoff, expected):
    assert nearest(name, iter(["beta", "lmbda"]), cutoff) == expected
