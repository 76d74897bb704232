"""Tests of the contract tests' harness."""

import numpy as np
import pytest

from tests.contract.harness import assert_close, error


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_number_that_is_not_finite_fails_in_any_leaf(wrong, place):
    expected = {"first": np.ones(2), "last": np.ones(3)}
    actual = expected | {place: np.full_like(expected[place], wrong)}
    for a, e in ((actual, expected), (expected, actual)):
        with pytest.raises(AssertionError, match=place):
            assert_close(a, e, 1e-12)


def test_the_largest_error_is_relative_to_its_own_leaf():
    expected = {"first": np.array([100.0, 1.0]), "last": np.array([1.0, 1.0])}
    actual = {"first": np.array([100.0, 1.5]), "last": np.array([1.0, 1.25])}
    worst, place = error(actual, expected)
    assert worst == 0.25
    assert "last" in place
    assert_close(actual, expected, 0.25)
