"""How experts become one distribution: a linear mixture, sum_e w_e p_e.

It can raise a word from 1e-6 where another expert knows better, which a shift of logits cannot. Here are fixed weights and
those that are best for a text; `gate.py` has weights that follow the stream.

Dimensions: `n` positions, `E` experts, `V` vocabulary.
"""

import math

import numpy as np

LOWEST = -40.0
"""Log-probability that stands for none at all, so that weights stay finite numbers."""


def mix(log_probabilities_nE: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the log-probabilities (n,) of a linear mixture; weights are (E,) or (n, E) and sum to 1."""
    with np.errstate(divide="ignore"):
        return _log_sum_exp(log_probabilities_nE + np.log(weights))


def with_uniform(log_probabilities_nE: np.ndarray, vocabulary: int) -> np.ndarray:
    """Append the uniform distribution over the vocabulary as a last component: (n, E + 1)."""
    uniform = np.full((len(log_probabilities_nE), 1), -math.log(vocabulary))
    return np.concatenate([log_probabilities_nE, uniform], axis=1)


def best_weights(log_probabilities_nE: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Return the weights (E,) under which the positions are most likely, by expectation maximization."""
    components = np.maximum(log_probabilities_nE.astype(np.float64), LOWEST)
    shares_nE = np.exp(components - components.max(axis=1, keepdims=True))
    weights = np.full(components.shape[1], 1 / components.shape[1])
    for _ in range(rounds):
        posteriors_nE = shares_nE * weights
        weights = (posteriors_nE / posteriors_nE.sum(axis=1, keepdims=True)).mean(axis=0)
    return weights


def _log_sum_exp(numbers_nE: np.ndarray) -> np.ndarray:
    largest = numbers_nE.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: np.ndarray = largest + np.log(np.exp(numbers_nE - largest[:, None]).sum(axis=1))
    return result
