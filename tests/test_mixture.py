"""Mixtures: worked by hand, cut into any pieces, blind to the future, and hardly disturbed by an expert that knows nothing."""

import math

import numpy as np
import pytest

from mbpa_lm.mixture import LOWEST, GateRule, OnlineGate, best_weights, mix, with_uniform

RULE = GateRule(interval=10, rate=0.02)


def experts_and_features(n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two experts, each right where a feature says so, and a second feature that says nothing."""
    generator = np.random.default_rng(seed)
    feature = generator.normal(size=n)
    good, bad = np.log(0.5), np.log(0.01)
    first = np.where(feature > 0, good, bad) + 0.1 * generator.normal(size=n)
    second = np.where(feature > 0, bad, good) + 0.1 * generator.normal(size=n)
    return np.stack([first, second], axis=1), np.stack([feature, generator.normal(size=n)], axis=1)


def score(components: np.ndarray, features: np.ndarray, lengths: list[int] | None = None) -> np.ndarray:
    gate = OnlineGate(components.shape[1], features.shape[1], RULE)
    ends = np.cumsum(lengths) if lengths else np.array([len(components)])
    begins = np.concatenate([[0], ends[:-1]])
    parts = [gate.score(components[a:b], features[a:b])[0] for a, b in zip(begins, ends, strict=True)]
    return np.concatenate(parts)


def test_a_mixture_by_hand() -> None:
    components = np.log(np.array([[0.5, 0.1], [0.2, 0.4]]))
    np.testing.assert_allclose(np.exp(mix(components, np.array([0.25, 0.75]))), [0.2, 0.35])
    np.testing.assert_allclose(np.exp(mix(components, np.array([[1.0, 0.0], [0.5, 0.5]]))), [0.5, 0.3])
    np.testing.assert_allclose(np.exp(mix(np.array([[-np.inf, 0.0]]), np.array([0.9, 0.1]))), [0.1])
    np.testing.assert_allclose(with_uniform(components, 8)[:, 2], [-math.log(8)] * 2)


def test_the_first_step_by_hand() -> None:
    components = np.log(np.array([[0.5, 0.1]] * 10))
    gate = OnlineGate(2, 1, RULE)
    found, weights = gate.score(components, np.zeros((10, 1)))
    np.testing.assert_allclose(np.exp(found), 0.3)
    np.testing.assert_allclose(weights, 0.5)
    # Adam's first step is the rate times the sign of the gradient, up for the first expert and down for the second.
    expected = 1 / (1 + math.exp(-2 * RULE.rate))
    np.testing.assert_allclose(gate.weights(np.zeros((1, 1)))[0, 0], expected, rtol=1e-6)


def test_the_gate_learns_whom_to_trust_and_when() -> None:
    components, features = experts_and_features()
    alone = -components.mean(axis=0).max()
    best_fixed = -mix(components, best_weights(components)).mean()
    gate = -score(components, features)
    assert gate[-1000:].mean() < 0.7 * best_fixed < 0.5 * alone
    assert gate[-1000:].mean() < -math.log(0.4)


@pytest.mark.parametrize("length", [1, 7, 10, 64])
def test_pieces_of_any_length_give_the_same(length: int) -> None:
    components, features = experts_and_features(640)
    lengths = [length] * (640 // length) + ([640 % length] if 640 % length else [])
    np.testing.assert_allclose(score(components, features, lengths), score(components, features), atol=1e-12)


def test_the_future_changes_nothing() -> None:
    components, features = experts_and_features(500)
    before = score(components, features)
    for position in (1, 255, 499):
        changed, other = components.copy(), features.copy()
        changed[position:] = np.log(0.3)
        other[position:] += 5
        assert (score(changed, other)[:position] == before[:position]).all()


def test_noise_costs_little() -> None:
    components, features = experts_and_features(20_000)
    noise = np.log(np.random.default_rng(1).dirichlet(np.ones(1000), size=20)[:, 0].repeat(1000))
    costs = score(components, features) - score(np.column_stack([components, noise]), features)
    assert costs[:1000].mean() < 0.2  # until it is known
    assert costs[10_000:].mean() < 0.005


def test_an_impossible_word_leaves_the_gate_finite() -> None:
    components, features = experts_and_features(100)
    components[:, 0] = -np.inf
    found = score(with_uniform(components, 50), features)
    assert np.isfinite(found).all()
    assert found.min() > LOWEST


def test_tuned_weights_are_the_likeliest() -> None:
    generator = np.random.default_rng(0)
    components = np.log(generator.uniform(0.01, 1, (400, 3)))
    tuned = best_weights(components, rounds=2000)
    assert tuned.sum() == pytest.approx(1)
    best = mix(components, tuned).mean()
    for other in generator.dirichlet(np.ones(3), 300):
        assert mix(components, other).mean() <= best + 1e-9
