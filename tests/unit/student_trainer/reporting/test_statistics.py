"""Against numbers worked by hand."""

import pytest

from student_trainer.reporting.statistics import (
    Estimate,
    estimate,
    paired_difference,
    t_quantile,
    wilson_interval,
)


def test_mean_and_interval_of_five():
    # 1..5: mean 3, variance 10/4 = 2.5, standard error sqrt(2.5/5) = .70711, t(4) = 2.7764.
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.margin == pytest.approx(2.7764 * 0.7071068, abs=1e-6)
    assert found.n == 5


def test_one_value_has_no_interval_and_tells_nothing_from_zero():
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert estimate([0.5]).covers_zero()


def test_no_values_are_an_error():
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_differences_are_paired_by_seed():
    # At every seed b is .1 above a, whatever the seed is worth: the pairing sees it exactly.
    a = {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.3}
    b = {0: 0.2, 1: 0.6, 2: 1.0, 7: 0.0}
    found = paired_difference(b, a)
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.margin == pytest.approx(0.0, abs=1e-12)
    assert found.n == 3
    assert not found.covers_zero()
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_what_is_made_once_is_held_against_every_seed():
    found = paired_difference({0: 0.5, 1: 0.7}, {None: 0.4})
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(0.2), 2)
    other_way = paired_difference({None: 0.4}, {0: 0.5, 1: 0.7})
    assert other_way is not None
    assert other_way.mean == pytest.approx(-0.2)
    assert paired_difference({None: 0.4}, {None: 0.1}) == Estimate(pytest.approx(0.3), None, 1)
    assert paired_difference({None: 0.4}, {}) is None


def test_an_interval_that_holds_zero_is_no_difference():
    assert estimate([-1.0, 0.0, 1.5]).covers_zero()
    assert not estimate([1.0, 1.1, 0.9]).covers_zero()
    assert not estimate([-1.0, -1.1, -0.9]).covers_zero()


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (4, 2.7764), (30, 2.0423), (31, 2.0395), (100, 1.9840)]
)
def test_quantiles_are_those_of_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)


def test_wilsons_interval_is_that_of_the_textbook():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 0 of 20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
