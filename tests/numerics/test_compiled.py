"""The exponential of compiled loops against NumPy's in float64."""

import numpy as np
import pytest

from mbpa_lm.numerics.compiled import exponential


def test_the_exponential_is_that_of_numpy() -> None:
    numbers = np.linspace(-87, 88, 20_001).astype(np.float32)
    found = np.array([exponential(number) for number in numbers], dtype=np.float64)
    expected = np.exp(numbers.astype(np.float64))
    assert np.abs(found / expected - 1).max() < 3e-7


@pytest.mark.parametrize(("number", "taken_as"), [(-np.inf, -87), (-1e9, -87), (1e9, 88), (np.inf, 88), (0, 0)])
def test_far_numbers_are_taken_as_the_farthest(number: float, taken_as: float) -> None:
    assert exponential(np.float32(number)) == exponential(np.float32(taken_as))


def test_nan_stays() -> None:
    assert np.isnan(exponential(np.float32(np.nan)))
