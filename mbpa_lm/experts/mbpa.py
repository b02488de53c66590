"""Memory-based Parameter Adaptation (Sprechmann et al., ICLR 2018): the softmax layer adapted for each prediction.

The neighbours of the query are weighted by the kernel, the layer takes a few gradient steps on them from the trained
weights, predicts once, and is discarded.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.kernels import gaussian, inverse_distance, neighbour_weights
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem, pick
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.config import AdaptationConfig
from mbpa_lm.errors import AdaptationError
from mbpa_lm.experts.base import Chunk
from mbpa_lm.models.base import OutputLayer

Solver = Callable[[Problem, AdaptationRule, Tensor | None], Tensor]


class MbpaExpert:
    """The base model with its output layer adapted to the neighbours of each position."""

    name = "mbpa"
    needs_neighbours = True

    def __init__(self, output_layer: OutputLayer, config: AdaptationConfig) -> None:
        solvers: dict[str, Solver] = {
            "restricted": partial(restricted.solve, moved_words=config.moved_words),
            "dual": dual.solve,
            "reference": reference.solve,
        }
        self._layer = output_layer
        self._solve = solvers[config.solver]
        self._rule = AdaptationRule(config.steps, config.alpha, config.beta, config.optimizer, config.bias)
        self._kernel = gaussian(config.bandwidth) if config.kernel == "gaussian" else inverse_distance(config.epsilon)

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        """Return the adapted log-probabilities (C, V); raises AdaptationError where they are not finite."""
        return self._adapt(chunk, None)

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        """Return the adapted log-probabilities (C,) of the targets; raises AdaptationError where they are not finite."""
        return self._adapt(chunk, targets)

    def _adapt(self, chunk: Chunk, targets: Tensor | None) -> Tensor:
        if self._rule.steps == 0 or self._rule.alpha == 0:
            return pick(chunk.base_log_probabilities, targets)
        adapted = self._solve(self._problem(chunk), self._rule, targets)
        if not bool(torch.isfinite(adapted).all()):
            raise AdaptationError(
                f"the adaptation diverged with adaptation.alpha {self._rule.alpha} and adaptation.steps {self._rule.steps}; "
                f"make one of them smaller"
            )
        return adapted

    def _problem(self, chunk: Chunk) -> Problem:
        assert chunk.neighbours is not None
        found = chunk.neighbours.entries
        return Problem(
            weight_Vd=self._layer.weight.detach(),
            bias_V=None if self._layer.bias is None else self._layer.bias.detach(),
            keys_BKd=found.keys,
            values_BK=found.values,
            weights_BK=neighbour_weights(self._kernel(chunk.neighbours.squared_distances)),
            queries_Bd=chunk.hidden_states,
            base=BaseSoftmax(
                chunk.base_log_probabilities, found.log_partitions, found.likely_words, found.likely_log_probabilities
            ),
        )
