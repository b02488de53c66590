"""The online gate: against a slow reference, cut into any pieces, blind to the future, hardly disturbed by noise."""

import math

import numpy as np
import pytest

from mbpa_lm.mixing.gate import GateRule, OnlineGate
from mbpa_lm.mixing.gate_compiled import FARTHEST, FORGETTING, MOMENTUM, SMALLEST, SMALLEST_VARIANCE, SQUARE_MOMENTUM
from mbpa_lm.mixing.mixture import LOWEST, best_weights, mix, with_uniform

RULE = GateRule(rates=(0.003, 0.02), shared=0.01)


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


def reference(components: np.ndarray, features: np.ndarray, rule: GateRule) -> tuple[np.ndarray, np.ndarray]:
    """Follow gate.py's docstring word by word; all that was seen is kept and averaged again at every position."""
    gates, experts, inputs = len(rule.rates), components.shape[1], features.shape[1] + 1
    parameters, momentum, squares = np.zeros((3, gates, experts, inputs))
    parameters[:, 0, 0] = math.log(experts - 1)
    trust = np.full(gates, 1 / gates)
    mean, variance = np.zeros(inputs - 1), np.ones(inputs - 1)
    scores, mixed = [], []
    for step, (log_probabilities, feature) in enumerate(zip(components, features, strict=True), 1):
        standard = np.clip((feature - mean) / np.sqrt(variance + SMALLEST_VARIANCE), -FARTHEST, FARTHEST)
        x = np.concatenate([[1.0], standard if step > 1 else np.zeros_like(standard)])
        weights = np.exp(parameters @ x)
        weights /= weights.sum(axis=1, keepdims=True)
        likelihoods = weights @ np.exp(log_probabilities)
        trust = (1 - rule.shared) * trust + rule.shared / gates
        scores.append(math.log(trust @ likelihoods))
        mixed.append(trust @ weights)
        posteriors = weights * np.exp(log_probabilities) / likelihoods[:, None]
        gradients = (weights - posteriors)[:, :, None] * x
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradients
        squares = SQUARE_MOMENTUM * squares + (1 - SQUARE_MOMENTUM) * gradients**2
        corrected = np.sqrt(squares / (1 - SQUARE_MOMENTUM**step)) + SMALLEST
        parameters = parameters - np.array(rule.rates)[:, None, None] * momentum / (1 - MOMENTUM**step) / corrected
        trust = trust * likelihoods / (trust @ likelihoods)
        share = max(1 / step, FORGETTING)
        if step > 1:
            variance = (1 - share) * variance + share * (1 - share) * (feature - mean) ** 2
        mean = mean + share * (feature - mean)
    return np.array(scores), np.array(mixed)


def test_the_compiled_gate_is_the_reference() -> None:
    components, features = experts_and_features(400)
    components = np.column_stack([components, np.full(400, math.log(0.02))])
    gate = OnlineGate(3, 2, RULE)
    scores, weights = gate.score(components, features)
    expected_scores, expected_weights = reference(components, features, RULE)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-10)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-8)


def test_the_first_step_by_hand() -> None:
    components = np.log(np.array([[0.5, 0.1]] * 2))
    scores, weights = OnlineGate(2, 1, GateRule(rates=(0.02,))).score(components, np.zeros((2, 1)))
    assert math.exp(scores[0]) == pytest.approx(0.3)
    assert weights[0] == pytest.approx([0.5, 0.5])
    # Adam's first step is the rate times the sign of the gradient, up for the first expert and down for the second.
    assert weights[1, 0] == pytest.approx(1 / (1 + math.exp(-2 * 0.02)), rel=1e-6)


def test_the_base_model_starts_with_half_the_weight() -> None:
    _, weights = OnlineGate(5, 1, RULE).score(np.zeros((1, 5)), np.zeros((1, 1)))
    assert weights[0] == pytest.approx([0.5, 0.125, 0.125, 0.125, 0.125])


def test_the_better_rate_is_trusted() -> None:
    components, features = experts_and_features()
    alone = [OnlineGate(2, 2, GateRule((rate,))).score(components, features)[0].mean() for rate in (1e-5, 0.02)]
    both = OnlineGate(2, 2, GateRule((1e-5, 0.02))).score(components, features)[0].mean()
    assert both > max(alone) - 0.02 > min(alone) + 0.2


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
