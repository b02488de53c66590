"""Memory-based Parameter Adaptation (Sprechmann et al., ICLR 2018): the softmax layer adapted for each prediction.

The neighbours of the query are weighted by the kernel, the layer takes a few gradient steps on them from the trained
weights, predicts once, and is discarded.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.kernels import Weighting, gaussian, inverse_distance, normalized, unnormalized, within_reach
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem, TrainedSoftmax, at_least_single, pick
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.adaptation.selection import most_informative
from mbpa_lm.config import AdaptationConfig
from mbpa_lm.config.checks import known
from mbpa_lm.errors import AdaptationError
from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.memory.base import Neighbours
from mbpa_lm.models.base import OutputLayer


class MbpaExpert(Expert):
    """The base model with its output layer adapted to the neighbours of each position."""

    def __init__(
        self, output_layer: OutputLayer, config: AdaptationConfig, neighbours: int, from_slow_weights: bool = False
    ) -> None:
        self.name = "mbpa+persistent" if from_slow_weights else "mbpa"
        self.needs_slow_weights = from_slow_weights
        self.neighbours = max(neighbours, config.candidates) if config.selection == "informative" else neighbours
        self.weight = config.weight
        self._used = neighbours
        self._layer = output_layer
        self._config = config
        self._rule = make_rule(config)
        self._weigh = make_weighting(config)
        self._bounds = _Bounds()

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        """Return the adapted log-probabilities (C, V); raises AdaptationError where they are not finite."""
        return self._adapt(chunk, None)

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        """Return the adapted log-probabilities (C,) of the targets; raises AdaptationError where they are not finite."""
        return self._adapt(chunk, targets)

    def add_to_logits(self, logits: Tensor, hidden_states: Tensor, neighbours: Neighbours) -> None:
        """Change logits (C, V) to those of the adapted layer, in place, up to a number that all words of a position share.

        Raises AdaptationError where they are not finite.
        """
        if self.is_idle:
            return
        found = self._select(neighbours, hidden_states)
        kept = found.entries
        base = BaseSoftmax(logits, kept.log_partitions, kept.likely_words, kept.likely_probabilities)
        weights = self._weigh(found.squared_distances)
        layer, config = self._layer, self._config
        states = (kept.keys, kept.values, weights, hidden_states)
        problem = Problem(
            layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), *states, base, layer.softcap
        )
        if config.solver != "restricted":
            base = replace(base, log_probabilities_BV=torch.log_softmax(at_least_single(logits), dim=-1))
            logits.copy_(self._solve(replace(problem, base=base), None))
            return
        bounds, widened = restricted.add_shifts(problem, self._rule, logits, config.moved_words, config.tolerance)
        self._check_finite(bounds)
        self._bounds.add(restricted.Solution(logits, bounds, widened))

    def details(self) -> dict[str, float]:
        """Return what is known of the solver's own error so far: nothing where it makes none."""
        return self._bounds.summary()

    @property
    def is_idle(self) -> bool:
        """Whether no step is taken: predictions are the base model's."""
        return self._rule.steps == 0 or self._rule.alpha == 0

    def _adapt(self, chunk: Chunk, targets: Tensor | None) -> Tensor:
        if self.is_idle:
            start = chunk.base_log_probabilities if chunk.slow is None else chunk.slow.log_probabilities
            return pick(start, targets)
        adapted = self._solve(self._problem(chunk), targets)
        self._check_finite(adapted)
        return adapted

    def _check_finite(self, numbers: Tensor) -> None:
        if not bool(torch.isfinite(numbers).all()):
            raise AdaptationError(
                f"the adaptation diverged with adaptation.alpha {self._rule.alpha} and adaptation.steps {self._rule.steps}; "
                f"make one of them smaller"
            )

    def _solve(self, problem: Problem, targets: Tensor | None) -> Tensor:
        if self._config.solver == "dual":
            return dual.solve(problem, self._rule, targets)
        if self._config.solver == "reference":
            return reference.solve(problem, self._rule, targets)
        config = self._config
        solution = restricted.solve_with_bounds(problem, self._rule, targets, config.moved_words, config.tolerance)
        self._bounds.add(solution)
        return solution.log_probabilities

    def _problem(self, chunk: Chunk) -> Problem:
        assert chunk.neighbours is not None
        neighbours = self._select(chunk.neighbours, chunk.hidden_states)
        return make_problem(self._layer, chunk, neighbours, self._weigh)

    def _select(self, neighbours: Neighbours, queries: Tensor) -> Neighbours:
        if self._config.selection == "nearest":
            return neighbours.first(self._used)
        candidates = neighbours.first(self._config.candidates)
        present = candidates.positions >= 0
        columns = most_informative(candidates.entries.keys.float(), queries.float(), present, self._used)
        return candidates.at(columns)


def make_problem(trained: OutputLayer, chunk: Chunk, neighbours: Neighbours, weigh: Weighting) -> Problem:
    """Return what a solver is given for a chunk: steps start from its slow weights where it has them."""
    found = neighbours.entries
    weight, bias = trained.weight.detach(), None if trained.bias is None else trained.bias.detach()
    start_weight, start_bias, slow = weight, bias, chunk.slow
    base = BaseSoftmax(chunk.base_log_probabilities, found.log_partitions, found.likely_words, found.likely_probabilities)
    if slow is not None:
        start_weight, start_bias = slow.weight, slow.bias
        at_trained = TrainedSoftmax(weight, bias, chunk.base_log_probabilities, chunk.base_log_partitions)
        base = replace(
            base, log_probabilities_BV=slow.log_probabilities, log_partitions_B=slow.log_partitions, trained=at_trained
        )
    weights_BK = weigh(neighbours.squared_distances)
    solved = (start_weight, start_bias, found.keys, found.values, weights_BK, chunk.hidden_states, base)
    return Problem(*solved, softcap=trained.softcap)


def make_rule(config: AdaptationConfig) -> AdaptationRule:
    """Return the configured steps."""
    schedule = None if config.schedule is None else tuple(config.schedule)
    alpha = known("adaptation.alpha", config.alpha) if config.steps else 0.0
    return AdaptationRule(config.steps, alpha, config.beta, config.optimizer, config.momentum, config.bias, schedule)


def make_weighting(config: AdaptationConfig) -> Weighting:
    """Return the weights of neighbours at given distances, as configured."""
    kernel = gaussian(config.bandwidth) if config.kernel == "gaussian" else inverse_distance(config.epsilon)
    if config.weighting == "within_reach":
        return within_reach(kernel, config.reach)
    return unnormalized(kernel) if config.weighting == "unnormalized" else normalized(kernel)


class _Bounds:
    """Adds up the restricted solver's bounds of its own error."""

    def __init__(self) -> None:
        self._count, self._sum, self._largest, self._widened = 0, 0.0, 0.0, 0

    def add(self, solution: restricted.Solution) -> None:
        self._count += len(solution.bounds_B)
        self._sum += float(solution.bounds_B.double().sum())
        self._largest = max(self._largest, float(solution.bounds_B.max()))
        self._widened += int(solution.widened_B.sum())

    def summary(self) -> dict[str, float]:
        if not self._count:
            return {}
        return {
            "error_bound_mean_nats": self._sum / self._count,
            "error_bound_worst_nats": self._largest,
            "widened_share": self._widened / self._count,
        }
