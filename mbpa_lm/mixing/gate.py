"""A gate over experts that needs no tuning: it learns, as the stream goes, whom to trust and when.

Its weights are softmax-linear in features that are known before the word, w = softmax(A f + a), the features in units of their
running standard deviation. After every position A and a take one step of Adam (Kingma and Ba 2015) on the mixture's loss there.
As nobody knows the right size of a step beforehand, several gates learn side by side, one for each rate, and are mixed by how
well they have predicted so far: the posterior over them, of which a share is given back to all at every position so that
another one may take over later (Herbster and Warmuth 1998, fixed share). Each prediction is made before its own step.

The first expert is the base model: it starts with half the weight. One more component, the uniform distribution over the
vocabulary (`mixture.with_uniform`), bounds every loss.

Dimensions: `n` positions, `E` experts, `F` features, `R` rates.
"""

from dataclasses import dataclass

import numpy as np

from mbpa_lm.mixing.gate_compiled import follow
from mbpa_lm.mixing.mixture import LOWEST


@dataclass(frozen=True)
class GateRule:
    """How fast the gate learns."""

    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    shared: float = 0.01  # of the trust in each rate, given back to all of them at every position


class OnlineGate:
    """Weights of experts that follow the stream."""

    def __init__(self, components: int, features: int, rule: GateRule) -> None:
        self._rule = rule
        gates = len(rule.rates)
        self._parameters, self._momentum, self._squares = np.zeros((3, gates, components, features + 1))  # a in column 0
        self._parameters[:, 0, 0] = np.log(max(components - 1, 1))
        self._trust = np.full(gates, 1 / gates)
        self._mean, self._variance = np.zeros(features), np.ones(features)
        self._seen = 0

    def score(self, log_probabilities_nE: np.ndarray, features_nF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mixture's log-probabilities (n,) of the next positions and its weights (n, E) there, and learn from them.

        However the stream is cut into pieces, the result is the same.
        """
        components = np.maximum(log_probabilities_nE.astype(np.float64), LOWEST)
        features = np.ascontiguousarray(features_nF, dtype=np.float64)
        scores, weights = np.empty(len(components)), np.zeros(components.shape)
        state = (self._parameters, self._momentum, self._squares, self._trust, self._mean, self._variance)
        follow(components, features, np.array(self._rule.rates), self._rule.shared, self._seen, *state, scores, weights)
        self._seen += len(components)
        return scores, weights
