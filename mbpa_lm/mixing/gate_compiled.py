"""The loop of `gate.py` over positions, each of which depends on the one before."""

import numpy as np

from mbpa_lm.numerics.compiled import compiled_part

FARTHEST = 4.0
"""Standard deviations beyond which a feature is not followed."""

MOMENTUM, SQUARE_MOMENTUM, SMALLEST = 0.9, 0.999, 1e-8
"""Of Adam, its defaults."""

FORGETTING = 1e-4
"""Least weight of a new position in the running mean and variance of a feature."""

SMALLEST_VARIANCE = 1e-4


@compiled_part
def follow(
    components: np.ndarray,
    features: np.ndarray,
    rates: np.ndarray,
    shared: float,
    seen: int,
    parameters: np.ndarray,
    momentum: np.ndarray,
    squares: np.ndarray,
    trust: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    scores: np.ndarray,
    mixed_weights: np.ndarray,
) -> None:
    """Set scores (n,) and mixed_weights (n, E) at each position, then learn from it; all float64.

    Changed in place: parameters, momentum and squares (R, E, F + 1), trust (R,), mean and variance (F,) of the features;
    `seen` positions came before.
    """
    experts, inputs = parameters.shape[1], parameters.shape[2]
    standard = np.ones(inputs)
    weights = np.empty((len(rates), experts))
    probabilities, likelihoods = np.empty(experts), np.empty(len(rates))
    for position in range(len(components)):
        largest = components[position].max()
        probabilities[:] = np.exp(components[position] - largest)
        _standardize(features[position], mean, variance, seen, standard)
        likelihood = 0.0
        for rate in range(len(rates)):
            _softmax_linear(parameters[rate], standard, weights[rate])
            likelihoods[rate] = (weights[rate] * probabilities).sum()
            trust[rate] = (1 - shared) * trust[rate] + shared / len(rates)
            likelihood += trust[rate] * likelihoods[rate]
            mixed_weights[position] += trust[rate] * weights[rate]
        scores[position] = largest + np.log(likelihood)
        trust *= likelihoods / likelihood
        seen += 1
        for rate in range(len(rates)):
            gradients = weights[rate] * (1 - probabilities / likelihoods[rate])
            _step(parameters[rate], momentum[rate], squares[rate], gradients, standard, rates[rate], seen)
        _follow_feature(features[position], mean, variance, seen)


@compiled_part
def _softmax_linear(parameters: np.ndarray, standard: np.ndarray, weights: np.ndarray) -> None:
    for expert in range(len(weights)):
        weights[expert] = (parameters[expert] * standard).sum()
    weights -= weights.max()
    weights[:] = np.exp(weights)
    weights /= weights.sum()


@compiled_part
def _standardize(features: np.ndarray, mean: np.ndarray, variance: np.ndarray, seen: int, standard: np.ndarray) -> None:
    """Set all but the first of `standard` to the features, in standard deviations from what was seen before."""
    for feature in range(len(features)):
        away = (features[feature] - mean[feature]) / np.sqrt(variance[feature] + SMALLEST_VARIANCE) if seen else 0.0
        standard[feature + 1] = min(max(away, -FARTHEST), FARTHEST)


@compiled_part
def _step(
    parameters: np.ndarray,
    momentum: np.ndarray,
    squares: np.ndarray,
    gradients: np.ndarray,
    standard: np.ndarray,
    rate: float,
    steps: int,
) -> None:
    """Take the step of Adam that is its `steps`-th; the gradient is the product of one number an expert and one an input."""
    scale = 1 / (1 - MOMENTUM**steps)
    square_scale = 1 / (1 - SQUARE_MOMENTUM**steps)
    for expert in range(parameters.shape[0]):
        for column in range(parameters.shape[1]):
            gradient = gradients[expert] * standard[column]
            momentum[expert, column] += (1 - MOMENTUM) * (gradient - momentum[expert, column])
            squares[expert, column] += (1 - SQUARE_MOMENTUM) * (gradient * gradient - squares[expert, column])
            length = np.sqrt(squares[expert, column] * square_scale) + SMALLEST
            parameters[expert, column] -= rate * momentum[expert, column] * scale / length


@compiled_part
def _follow_feature(features: np.ndarray, mean: np.ndarray, variance: np.ndarray, seen: int) -> None:
    """Move the running mean and variance towards a position, the `seen`-th of all."""
    share = max(1.0 / seen, FORGETTING)
    for feature in range(len(features)):
        away = features[feature] - mean[feature]
        mean[feature] += share * away
        if seen > 1:
            variance[feature] = (1 - share) * (variance[feature] + share * away * away)
