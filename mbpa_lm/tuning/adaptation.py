"""Fit the local adaptation: window, step sizes, pull back, kernel, reach, metric, and its share beside the base model.

A pass over the validation text with each of a few windows gathers examples, spread evenly over it: the query, its candidates,
the true next word. The last quarter is held out. A grid over window, step size and number of steps is tried first, as a user
would; from its best point gradient descent goes on, for each kernel, and the fit that is best on the held-out quarter is
kept.

Steps are kept so short that each goes downhill, where the restricted solver's bound of its error is small: to go far takes
many.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mbpa_lm.adaptation.fitting import (
    MOVED_WORDS,
    Examples,
    Fit,
    adapted_losses,
    fit_by_gradient_descent,
    mixed_losses,
    of_targets,
    prepare_examples,
    typical_squared_distance,
)
from mbpa_lm.adaptation.kernels import inverse_distance, normalized
from mbpa_lm.config import Config
from mbpa_lm.errors import DataError
from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.experts.mbpa import make_problem, make_rule
from mbpa_lm.mixing.mixture import best_weights
from mbpa_lm.models.base import OutputLayer
from mbpa_lm.scoring.resources import make_stream_memory
from mbpa_lm.system.progress import ProgressBar
from mbpa_lm.tuning.passes import Validation

EXAMPLES = 6000
LARGEST_EXAMPLES_BYTES = 2 << 30
HELD_OUT = 0.25
GRID_EVERY = 3
"""Of the fitting examples, the grid looks at every so manieth."""
EPOCHS, BATCH_SIZE, LEARNING_RATE = 5, 128, 0.05
AT_ONCE = 256
WINDOWS = (1.0, 0.4, 0.2, 0.1)
"""Times memory.size."""
STEP_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of the grid, summed over the steps, times 1 / the mean squared norm of the queries: what a step of the bare key moves by."""
LONGEST_STEP = 2.0
"""Of one step, in the same unit: the curvature along the neighbours is at most half that norm, and 2 / curvature overshoots."""
FAR, NEAR = 1e3, 3.0
"""Reach, in typical distances, of the grid, and of the start of the gradient descent."""
HARDLY = 1e-3
"""Pull back to the trained weights at the start."""
SHARES = (0.02, 0.98)
"""Least and largest share of the adapted prediction that the grid chooses."""


@dataclass(frozen=True)
class FittedAdaptation:
    """The best settings, and what they gave on examples that nothing was fitted on."""

    adaptation: dict[str, Any]  # values of AdaptationConfig
    memory: dict[str, Any]  # of MemoryConfig
    metric: list[float]
    losses: dict[str, float]  # nats a token: base, configured, best grid point, tuned


def tune_adaptation(validation: Validation) -> FittedAdaptation:
    """Fit on the validation text. Raises DataError where it is too short."""
    config = validation.config
    losses: dict[str, float] = {}
    best: tuple[float, Fit, _Task] | None = None
    for size in _windows(config):
        task = _task(validation, size)
        if not losses:  # the first window is the configured one
            losses["base"] = float(-of_targets(task.examples.rows(task.held_out)).mean())
            is_gaussian = config.adaptation.kernel == "gaussian"
            losses["configured"] = task.held_out_mean(_configured(config, task), is_gaussian, longest=math.inf)
        found = min(_grid(config, task, is_gaussian=False), key=lambda pair: pair[0])
        if best is None or found[0] < best[0]:
            best = (*found, task)
    assert best is not None
    _, grid_point, task = best
    with ProgressBar(f"fitting the adaptation on {validation.stream.name}", 2 * EPOCHS, "passes") as progress:
        kept = _descend(task, grid_point, False, progress)
        kept += _descend(task, min(_grid(config, task, is_gaussian=True), key=lambda pair: pair[0])[1], True, progress)
    loss, fit, is_gaussian = min(kept, key=lambda candidate: candidate[0])
    losses |= {"best grid point": task.held_out_mean(grid_point, False), "tuned": loss}
    return _fitted(config, fit, is_gaussian, task, losses)


@dataclass(frozen=True)
class _Task:
    """The examples of a window and how their loss is computed."""

    examples: Examples
    size: int  # of the window
    neighbours: int
    typical: float  # squared distance
    norm: float  # mean squared norm of the queries

    @property
    def cut(self) -> int:
        return int(len(self.examples.target_N) * (1 - HELD_OUT))

    @property
    def held_out(self) -> Tensor:
        return torch.arange(self.cut, len(self.examples.target_N))

    @property
    def longest(self) -> float:
        return LONGEST_STEP / self.norm

    def losses(self, fit: Fit, is_gaussian: bool, rows: Tensor, longest: float | None = None) -> Tensor:
        """Return the loss of each mixed prediction, differentiable in the fit; `longest` is that of a step if it is given."""
        longest = self.longest if longest is None else longest
        return mixed_losses(self.examples.rows(rows), fit, self.neighbours, self.typical, is_gaussian, longest)

    @torch.no_grad()
    def held_out_mean(self, fit: Fit, is_gaussian: bool, longest: float | None = None) -> float:
        parts = [self.losses(fit, is_gaussian, rows, longest) for rows in self.held_out.split(AT_ONCE)]
        return float(torch.cat(parts).mean())

    @torch.no_grad()
    def with_best_share(self, fit: Fit, is_gaussian: bool, rows: Tensor) -> tuple[float, Fit]:
        """Return the loss on some examples, and the fit with the share that is best there."""
        parts = [
            adapted_losses(self.examples.rows(some), fit, self.neighbours, self.typical, is_gaussian, self.longest)
            for some in rows.split(AT_ONCE)
        ]
        pair = torch.stack([of_targets(self.examples.rows(rows)), -torch.cat(parts)], dim=1)
        share = min(max(float(best_weights(pair.cpu().double().numpy())[1]), SHARES[0]), SHARES[1])
        logs = torch.tensor([1 - share, share], device=pair.device).log()
        logit = torch.tensor(math.log(share / (1 - share)), device=pair.device)
        return float(-(pair + logs).logsumexp(1).mean()), replace(fit, logit_share=logit)


def _windows(config: Config) -> list[int]:
    """Return the sizes that are tried, the configured one first; each holds all candidates."""
    sizes = [round(config.memory.size * share) for share in WINDOWS]
    return [size for size in sizes if size >= 2 * config.memory.neighbours] or sizes[:1]


def _task(validation: Validation, size: int) -> _Task:
    examples = _gather(validation, size)
    norm = float(examples.queries_Nd.square().sum(1).mean())
    return _Task(examples, size, validation.config.memory.neighbours, typical_squared_distance(examples), norm)


class _Collector(Expert):
    """Stands in for an expert, and keeps what it is shown at every so manieth position."""

    name = "examples"

    def __init__(self, layer: OutputLayer, config: Config, every: int) -> None:
        self.neighbours = 2 * config.memory.neighbours
        self.parts: list[Examples] = []
        self._layer, self._config, self._every, self._position = layer, config, every, 0

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        return chunk.base_log_probabilities

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        assert chunk.neighbours is not None
        rows = torch.arange(-self._position % self._every, len(targets), self._every, device=targets.device)
        self._position += len(targets)
        weigh = normalized(inverse_distance(self._config.adaptation.epsilon))
        problem = make_problem(self._layer, chunk, chunk.neighbours, weigh).rows(rows)
        if len(rows):
            absent = chunk.neighbours.positions[rows] < 0
            bias = self._config.adaptation.bias
            self.parts.append(prepare_examples(problem.accumulating_but_the_layer(), targets[rows], absent, bias))
        return targets.new_zeros(len(targets), dtype=torch.float32)


def _gather(validation: Validation, size: int) -> Examples:
    config, model = validation.config, validation.checkpoint.model
    neighbours = 2 * config.memory.neighbours
    bytes_each = 4 * neighbours * (model.hidden_size + 2 * neighbours + 64)
    wanted = min(EXAMPLES, LARGEST_EXAMPLES_BYTES // bytes_each)
    layer = model.output_layer()
    collector = _Collector(layer, config, max(1, (len(validation.stream) - 1) // wanted))
    likely_words = min(config.memory.likely_words, model.vocabulary_size)
    memory = make_stream_memory(replace(config, memory=replace(config.memory, size=size)), model, likely_words)
    validation.score(f"gathering examples with a window of {size:,}", [collector], memory)
    # A part may have fewer moved words than another where the vocabulary is small: those without the most are left out.
    widest = max(part.log_probabilities_NS1.shape[1] for part in collector.parts)
    whole = [part for part in collector.parts if part.log_probabilities_NS1.shape[1] == widest]
    examples = Examples(*(torch.cat([getattr(part, field.name) for part in whole]) for field in fields(Examples)))
    usable = (~examples.absent_Nn).sum(1) >= config.memory.neighbours
    examples = examples.rows(usable.nonzero()[:, 0])
    if len(examples.target_N) < 100:
        raise DataError(
            f"{validation.stream.name} gives {len(examples.target_N)} examples to fit on, at least 100 are needed; "
            f"give a longer validation text or make memory.neighbours smaller"
        )
    return examples


def _grid(config: Config, task: _Task, is_gaussian: bool) -> Iterator[tuple[float, Fit]]:
    """Give each point's loss with its best share."""
    many = max(config.adaptation.steps, 2)
    rows = torch.arange(0, task.cut, GRID_EVERY)
    width = 1.0 if is_gaussian else config.adaptation.epsilon / task.typical
    for steps, size in itertools.product((1, many, 2 * many), STEP_SIZES):
        if size <= LONGEST_STEP * steps:
            fit = _make_fit([size / task.norm / steps] * steps, 0.0, width, FAR, 1 - 1e-6, task)
            yield task.with_best_share(fit, is_gaussian, rows)


def _configured(config: Config, task: _Task) -> Fit:
    adaptation = config.adaptation
    width = adaptation.epsilon if adaptation.kernel == "inverse_distance" else 2 * adaptation.bandwidth**2
    reach = adaptation.reach / task.typical**0.5 if adaptation.weighting == "within_reach" else FAR
    share = min(adaptation.weight, 1 - 1e-6)
    return _make_fit(make_rule(adaptation).step_sizes(), adaptation.beta, width / task.typical, reach, share, task)


def _make_fit(steps: list[float], beta: float, width: float, reach: float, share: float, task: _Task) -> Fit:
    log_metric_d = torch.zeros_like(task.examples.queries_Nd[0])
    device = log_metric_d.device
    steps_T, beta_, width_, reach_, share_ = (
        torch.tensor(values, device=device) for values in (steps, beta, width, reach, share)
    )
    return Fit(steps_T.log(), beta_.log(), width_.log(), reach_.log(), log_metric_d, share_.logit())


def _descend(task: _Task, start: Fit, is_gaussian: bool, progress: ProgressBar) -> list[tuple[float, Fit, bool]]:
    """Return the fit after each epoch with its loss on the held-out examples."""
    far = torch.full_like(start.log_reach, math.log(NEAR))
    start = replace(start, log_reach=far, log_beta=torch.full_like(start.log_beta, math.log(HARDLY)))
    found: list[tuple[float, Fit, bool]] = []

    def keep(epoch: int, fit: Fit) -> None:
        found.append((task.held_out_mean(fit, is_gaussian), fit.detached(), is_gaussian))
        progress.advance(1, f"held out {math.exp(min(loss for loss, _, _ in found)):.2f}")

    def loss(fit: Fit, rows: Tensor) -> Tensor:
        return task.losses(fit, is_gaussian, rows)

    fit_by_gradient_descent(start, loss, task.cut, EPOCHS, BATCH_SIZE, LEARNING_RATE, keep)
    return found


def _fitted(config: Config, fit: Fit, is_gaussian: bool, task: _Task, losses: dict[str, float]) -> FittedAdaptation:
    steps, width = fit.step_sizes(task.longest), float(fit.log_width.exp()) * task.typical
    alpha = float(steps.mean())
    adaptation = {
        "steps": len(steps),
        "alpha": alpha,
        "schedule": [float(step) / alpha for step in steps],
        "beta": float(fit.log_beta.exp()),
        "kernel": "gaussian" if is_gaussian else "inverse_distance",
        "epsilon": config.adaptation.epsilon if is_gaussian else width,
        "bandwidth": (width / 2) ** 0.5 if is_gaussian else config.adaptation.bandwidth,
        "weighting": "within_reach",
        "reach": float(fit.log_reach.exp()) * task.typical**0.5,
        "weight": float(fit.logit_share.sigmoid()),
        "moved_words": max(MOVED_WORDS, config.adaptation.moved_words),
        "bias": config.adaptation.bias,
        "optimizer": "sgd",
        "selection": "nearest",
    }
    memory = {"size": task.size, "neighbours": config.memory.neighbours}
    return FittedAdaptation(adaptation, memory, [float(number) for number in fit.log_metric_d.exp()], losses)
