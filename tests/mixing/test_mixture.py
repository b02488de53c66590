"""Fixed mixtures: worked by hand, and the likeliest of all."""

import math

import numpy as np
import pytest

from mbpa_lm.mixing.mixture import best_weights, mix, with_uniform


def test_a_mixture_by_hand() -> None:
    components = np.log(np.array([[0.5, 0.1], [0.2, 0.4]]))
    np.testing.assert_allclose(np.exp(mix(components, np.array([0.25, 0.75]))), [0.2, 0.35])
    np.testing.assert_allclose(np.exp(mix(components, np.array([[1.0, 0.0], [0.5, 0.5]]))), [0.5, 0.3])
    np.testing.assert_allclose(np.exp(mix(np.array([[-np.inf, 0.0]]), np.array([0.9, 0.1]))), [0.1])
    np.testing.assert_allclose(with_uniform(components, 8)[:, 2], [-math.log(8)] * 2)


def test_tuned_weights_are_the_likeliest() -> None:
    generator = np.random.default_rng(0)
    components = np.log(generator.uniform(0.01, 1, (400, 3)))
    tuned = best_weights(components, rounds=2000)
    assert tuned.sum() == pytest.approx(1)
    best = mix(components, tuned).mean()
    for other in generator.dirichlet(np.ones(3), 300):
        assert mix(components, other).mean() <= best + 1e-9
