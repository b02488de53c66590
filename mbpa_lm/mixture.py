"""How experts become one distribution: fixed weights, or a gate that needs no tuning.

A linear mixture, sum_e w_e p_e, can raise a word from 1e-6 where another expert knows better. The weights of the gate are
softmax-linear in features that are known before the word, w = softmax(A f + a), and A and a follow the stream: after every
`interval` positions they take one step of Adam on the mixture's mean loss there. Each prediction is made before its own step.
One more component, the uniform distribution over the vocabulary, bounds every loss.

Dimensions: `n` positions, `E` experts, `F` features, `V` vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np

LOWEST = -40.0
"""Log-probability that stands for none at all, so that weights stay finite numbers."""

FARTHEST = 4.0
"""Standard deviations beyond which a feature is not followed."""

MOMENTUM, SQUARE_MOMENTUM, SMALLEST = 0.9, 0.999, 1e-8
"""Of Adam (Kingma and Ba 2015), its defaults."""

FORGETTING = 1e-4
"""Least weight of a new position in the running mean and variance of a feature."""


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


@dataclass(frozen=True)
class GateRule:
    """How fast the gate learns."""

    interval: int = 10  # positions between steps
    rate: float = 0.01


class OnlineGate:
    """Weights of experts that follow the stream."""

    def __init__(self, components: int, features: int, rule: GateRule) -> None:
        self._rule = rule
        self._parameters = np.zeros((components, features + 1))  # a in the first column
        self._momentum, self._squares = np.zeros((2, components, features + 1))
        self._mean, self._variance = np.zeros(features), np.ones(features)
        self._steps = self._seen = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # of positions since the last step

    def score(self, log_probabilities_nE: np.ndarray, features_nF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mixture's log-probabilities (n,) of the next positions and its weights (n, E) there, and learn from them.

        However the stream is cut into pieces, the result is the same.
        """
        components = np.maximum(log_probabilities_nE.astype(np.float64), LOWEST)
        features = features_nF.astype(np.float64)
        scores, weights = np.empty(len(components)), np.empty(components.shape)
        begin = 0
        while begin < len(components):
            waiting = sum(len(part) for part, _ in self._waiting)
            piece = slice(begin, min(len(components), begin + self._rule.interval - waiting))
            weights[piece] = np.exp(self._log_weights(features[piece]))
            scores[piece] = mix(components[piece], weights[piece])
            self._waiting.append((components[piece], features[piece]))
            if waiting + piece.stop - piece.start == self._rule.interval:
                self._learn(*(np.concatenate(column) for column in zip(*self._waiting, strict=True)))
                self._waiting = []
            begin = piece.stop
        return scores, weights

    def weights(self, features_nF: np.ndarray) -> np.ndarray:
        """Return the weights (n, E) that positions would get now."""
        weights: np.ndarray = np.exp(self._log_weights(features_nF.astype(np.float64)))
        return weights

    def _inputs(self, features_nF: np.ndarray) -> np.ndarray:
        """Return a 1 and the features, standardized by what was seen before: (n, 1 + F)."""
        standard = np.zeros_like(features_nF)
        if self._seen:
            standard = ((features_nF - self._mean) / np.sqrt(self._variance + 1e-4)).clip(-FARTHEST, FARTHEST)
        return np.concatenate([np.ones((len(features_nF), 1)), standard], axis=1)

    def _log_weights(self, features_nF: np.ndarray) -> np.ndarray:
        logits = self._inputs(features_nF) @ self._parameters.T
        log_weights: np.ndarray = logits - _log_sum_exp(logits)[:, None]
        return log_weights

    def _learn(self, components_nE: np.ndarray, features_nF: np.ndarray) -> None:
        log_weights = self._log_weights(features_nF)
        joint = log_weights + components_nE
        posteriors = np.exp(joint - _log_sum_exp(joint)[:, None])
        gradient = (np.exp(log_weights) - posteriors).T @ self._inputs(features_nF) / len(components_nE)
        self._steps += 1
        self._momentum += (1 - MOMENTUM) * (gradient - self._momentum)
        self._squares += (1 - SQUARE_MOMENTUM) * (gradient**2 - self._squares)
        momentum = self._momentum / (1 - MOMENTUM**self._steps)
        squares = self._squares / (1 - SQUARE_MOMENTUM**self._steps)
        self._parameters -= self._rule.rate * momentum / (np.sqrt(squares) + SMALLEST)
        self._follow(features_nF)

    def _follow(self, features_nF: np.ndarray) -> None:
        """Move the running mean and variance towards those of some positions."""
        count = len(features_nF)
        share = max(count / (self._seen + count), min(1.0, count * FORGETTING))
        away = features_nF.mean(axis=0) - self._mean
        variance = features_nF.var(axis=0) if count > 1 or self._seen else np.ones_like(self._variance)
        self._variance = (1 - share) * self._variance + share * variance + share * (1 - share) * away**2
        self._mean = self._mean + share * away
        self._seen += count


def _log_sum_exp(numbers_nE: np.ndarray) -> np.ndarray:
    largest = numbers_nE.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: np.ndarray = largest + np.log(np.exp(numbers_nE - largest[:, None]).sum(axis=1))
    return result
