"""Memory-based Parameter Adaptation (Sprechmann et al., ICLR 2018): the softmax layer adapted for each prediction.

The neighbours of the query are weighted by the kernel, the layer takes a few gradient steps on them from the trained
weights, predicts once, and is discarded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mbpa_lm.adaptation import dual, reference
from mbpa_lm.adaptation.kernels import gaussian, inverse_distance, neighbour_weights
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.config import AdaptationConfig
from mbpa_lm.errors import AdaptationError
from mbpa_lm.experts.base import Chunk
from mbpa_lm.models.base import OutputLayer

SOLVERS: dict[str, Callable[..., Tensor]] = {"dual": dual.solve, "reference": reference.solve}


class MbpaExpert:
    """The base model with its output layer adapted to the neighbours of each position."""

    name = "mbpa"
    needs_neighbours = True

    def __init__(self, output_layer: OutputLayer, config: AdaptationConfig) -> None:
        self._layer = output_layer
        self._config = config
        self._solve = SOLVERS[config.solver]
        self._rule = AdaptationRule(config.steps, config.alpha, config.beta, config.optimizer, config.bias)
        self._kernel = gaussian(config.bandwidth) if config.kernel == "gaussian" else inverse_distance(config.epsilon)

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        """Return the adapted log-probabilities (C, V); raises AdaptationError where the steps diverge."""
        if self._rule.steps == 0 or self._rule.alpha == 0:
            return chunk.base_log_probabilities
        neighbours = chunk.neighbours
        assert neighbours is not None
        weights = neighbour_weights(self._kernel(neighbours.squared_distances))
        weight, bias = self._layer
        adapted = self._solve(
            weight.detach(),
            None if bias is None else bias.detach(),
            neighbours.keys,
            neighbours.values,
            weights,
            chunk.hidden_states,
            self._rule,
        )
        if not bool(torch.isfinite(adapted).all()):
            raise AdaptationError(
                f"the adaptation diverged with adaptation.alpha {self._rule.alpha} and adaptation.steps {self._rule.steps}; "
                f"make one of them smaller"
            )
        return adapted
