"""Uniforms are a function of their key alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.sampling import uniform_rows, uniforms

PUBLISHED = [0.7576293691490729, 0.5643749060814042, 0.14220310647506018]

parts = st.integers(0, 2**63) | st.binary(max_size=8) | st.text(max_size=4)


@given(st.lists(parts, min_size=1, max_size=4), st.integers(0, 20), st.integers(0, 20))
def test_a_longer_stream_begins_with_the_shorter_one(key, count, more):
    short, long = uniforms(*key, count=count), uniforms(*key, count=count + more)
    np.testing.assert_array_equal(short, long[:count])
    assert ((long >= 0) & (long < 1)).all()


def test_the_stream_never_changes_between_versions():
    got = uniforms("generate", 7, b"\x01\x00\x00\x00", 0, count=3)
    np.testing.assert_allclose(got, PUBLISHED, rtol=0, atol=1e-15)


@given(st.integers(0, 50), st.integers(0, 9), st.integers(0, 9), st.integers(1, 11))
def test_a_row_does_not_depend_on_the_rows_asked_for_with_it(first, before, after, width):
    whole = uniform_rows("key", first=first, rows=before + 1 + after, width=width)
    alone = uniform_rows("key", first=first + before, rows=1, width=width)
    np.testing.assert_array_equal(whole[before : before + 1], alone)
    assert len(np.unique(whole)) == whole.size  # no number stands in two rows


def test_the_rows_begin_with_the_keys_own_stream():
    rows = uniform_rows("a", 1, first=0, rows=3, width=4)
    np.testing.assert_array_equal(rows.ravel(), uniforms("a", 1, count=12))


def test_other_keys_give_other_streams():
    keys = [("a", "b"), ("ab",), ("", "ab"), ("a", "b", ""), (1,), (2,), (12,), (1, 2), (b"a", 0)]
    streams = {tuple(uniforms(*key, count=4)) for key in keys}
    assert len(streams) == len(keys)


def test_the_uniforms_are_uniform():
    values = uniforms("mean", count=20_000)
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert abs(values.mean() - 0.5) < 0.01  # five standard errors
    assert abs(counts - 2_000).max() < 5 * np.sqrt(2_000 * 0.9)
