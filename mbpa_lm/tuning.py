"""`evaluate.py --tune`: fit the local adaptation on the validation text, in a minute or two.

A pass over the first validation tokens gathers examples, spread evenly over it: the query, its candidates, the true next word.
The last quarter is held out. A grid over step size, number of steps and kernel is tried first, as a user would; from its best
point gradient descent goes on, for each kernel, and the fit that is best on the held-out quarter is kept.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mbpa_lm.adaptation.fitting import (
    Examples,
    Fit,
    fit_by_gradient_descent,
    losses,
    prepare_examples,
    typical_squared_distance,
)
from mbpa_lm.adaptation.kernels import inverse_distance, normalized
from mbpa_lm.config import Config
from mbpa_lm.data.streams import TokenStream
from mbpa_lm.errors import DataError
from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.experts.mbpa import make_problem, make_rule
from mbpa_lm.fitted import FittedAdaptation
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.base import OutputLayer
from mbpa_lm.models.build import Model
from mbpa_lm.progress import ProgressBar
from mbpa_lm.scoring import score_stream

EXAMPLES = 6000
LARGEST_EXAMPLES_BYTES = 2 << 30
TOKENS = 30_000
HELD_OUT = 0.25
EPOCHS, BATCH_SIZE, LEARNING_RATE = 5, 128, 0.05
AT_ONCE = 256
STEP_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the grid, times 1 / the mean squared norm of the queries, summed over the steps: what a step of the bare key moves by."""
FAR, NEAR = 1e3, 3.0
"""Reach, in typical distances, of the grid, and of the start of the gradient descent."""
HARDLY = 1e-3
"""Pull back to the trained weights at the start."""


def tune(config: Config, model: Model, stream: TokenStream) -> FittedAdaptation:
    """Fit step sizes, pull back, kernel, reach and metric on a validation stream.

    Raises DataError where the stream is too short.
    """
    stream = stream.first(TOKENS + 1)
    examples = _gather(config, model, stream)
    count = len(examples.target_N)
    cut = int(count * (1 - HELD_OUT))
    task = _Task(examples, config.memory.neighbours, typical_squared_distance(examples))
    fitting, held_out = torch.arange(cut), torch.arange(cut, count)
    with ProgressBar(f"fitting on {stream.name}", len(STEP_SIZES) * 4 + 2 * EPOCHS) as progress:
        candidates = []
        for fit, is_gaussian in _grid(config, task):
            candidates.append((task.mean(fit, is_gaussian, fitting), fit, is_gaussian))
            progress.advance(1, f"grid {math.exp(min(loss for loss, _, _ in candidates)):.2f}")
        _, best_of_grid, best_kernel = min(candidates, key=lambda candidate: candidate[0])
        kept: list[tuple[float, Fit, bool]] = []
        for is_gaussian in (False, True):
            best = min((one for one in candidates if one[2] == is_gaussian), key=lambda candidate: candidate[0])
            kept += _descend(task, best[1], is_gaussian, cut, held_out, progress)
    loss, fit, is_gaussian = min(kept, key=lambda candidate: candidate[0])
    configured = _configured(config, task)
    found = {
        "base": float(-_of_targets(examples.rows(held_out)).mean()),
        "configured": task.mean(configured, config.adaptation.kernel == "gaussian", held_out),
        "best_grid_point": task.mean(best_of_grid, best_kernel, held_out),
        "fitted": loss,
    }
    return _fitted(config, fit, is_gaussian, task.typical, stream.name, count, found)


@dataclass(frozen=True)
class _Task:
    """The examples and how their loss is computed."""

    examples: Examples
    neighbours: int
    typical: float

    def losses(self, fit: Fit, is_gaussian: bool, rows: Tensor) -> Tensor:
        return losses(self.examples.rows(rows), fit, self.neighbours, self.typical, is_gaussian)

    @torch.no_grad()
    def mean(self, fit: Fit, is_gaussian: bool, rows: Tensor) -> float:
        return float(torch.cat([self.losses(fit, is_gaussian, some) for some in rows.split(AT_ONCE)]).mean())


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


def _gather(config: Config, model: Model, stream: TokenStream) -> Examples:
    neighbours = 2 * config.memory.neighbours
    bytes_each = 4 * neighbours * (model.hidden_size + 2 * neighbours + 64)
    wanted = min(EXAMPLES, LARGEST_EXAMPLES_BYTES // bytes_each)
    layer = model.output_layer()
    collector = _Collector(layer, config, max(1, (len(stream) - 1) // wanted))
    likely_words = min(config.memory.likely_words, model.vocabulary_size)
    memory = WindowMemory(config.memory.size, model.hidden_size, likely_words, layer.weight.dtype, layer.weight.device)
    score_stream(model, stream.tokens, [collector], memory, config.evaluation.chunk_length)
    # A part may have fewer moved words than another where the vocabulary is small: those without the most are left out.
    widest = max(part.log_probabilities_NS1.shape[1] for part in collector.parts)
    whole = [part for part in collector.parts if part.log_probabilities_NS1.shape[1] == widest]
    examples = Examples(*(torch.cat([getattr(part, field.name) for part in whole]) for field in fields(Examples)))
    usable = (~examples.absent_Nn).sum(1) >= config.memory.neighbours
    examples = examples.rows(usable.nonzero()[:, 0])
    if len(examples.target_N) < 100:
        raise DataError(
            f"{stream.name} gives {len(examples.target_N)} examples to fit on, at least 100 are needed; "
            f"give a longer validation text or make memory.neighbours smaller"
        )
    return examples


def _grid(config: Config, task: _Task) -> Iterator[tuple[Fit, bool]]:
    norm = float(task.examples.queries_Nd.square().sum(1).mean())
    many = max(config.adaptation.steps, 2)
    for is_gaussian, steps, size in itertools.product((False, True), (1, many), STEP_SIZES):
        width = 1.0 if is_gaussian else config.adaptation.epsilon / task.typical
        yield _make_fit([8 * size / norm / steps] * steps, 0.0, width, FAR, task), is_gaussian


def _configured(config: Config, task: _Task) -> Fit:
    adaptation = config.adaptation
    width = adaptation.epsilon if adaptation.kernel == "inverse_distance" else 2 * adaptation.bandwidth**2
    reach = adaptation.reach / task.typical**0.5 if adaptation.weighting == "within_reach" else FAR
    return _make_fit(make_rule(adaptation).step_sizes(), adaptation.beta, width / task.typical, reach, task)


def _make_fit(steps: list[float], beta: float, width: float, reach: float, task: _Task) -> Fit:
    log_metric_d = torch.zeros_like(task.examples.queries_Nd[0])
    device = log_metric_d.device
    steps_T, beta_, width_, reach_ = (torch.tensor(values, device=device) for values in (steps, beta, width, reach))
    return Fit(steps_T.log(), beta_.log(), width_.log(), reach_.log(), log_metric_d)


def _descend(
    task: _Task, start: Fit, is_gaussian: bool, cut: int, held_out: Tensor, progress: ProgressBar
) -> list[tuple[float, Fit, bool]]:
    """Return the fit after each epoch with its loss on the held-out examples."""
    tensors = {**vars(start), "log_reach": torch.full_like(start.log_reach, math.log(NEAR))}
    tensors["log_beta"] = torch.full_like(start.log_beta, math.log(HARDLY))
    found: list[tuple[float, Fit, bool]] = []

    def keep(epoch: int, fit: Fit) -> None:
        found.append((task.mean(fit, is_gaussian, held_out), fit.detached(), is_gaussian))
        progress.advance(1, f"held out {math.exp(min(loss for loss, _, _ in found)):.2f}")

    fit_by_gradient_descent(
        Fit(**tensors), lambda fit, rows: task.losses(fit, is_gaussian, rows), cut, EPOCHS, BATCH_SIZE, LEARNING_RATE, keep
    )
    return found


def _of_targets(examples: Examples) -> Tensor:
    return examples.log_probabilities_NS1.gather(1, examples.target_N[:, None])[:, 0]


def _fitted(
    config: Config, fit: Fit, is_gaussian: bool, typical: float, stream: str, examples: int, found: dict[str, float]
) -> FittedAdaptation:
    steps, width = fit.log_steps_T.exp(), float(fit.log_width.exp()) * typical
    alpha = float(steps.mean())
    return FittedAdaptation(
        neighbours=config.memory.neighbours,
        alpha=alpha,
        schedule=[float(step) / alpha for step in steps],
        beta=float(fit.log_beta.exp()),
        kernel="gaussian" if is_gaussian else "inverse_distance",
        epsilon=config.adaptation.epsilon if is_gaussian else width,
        bandwidth=(width / 2) ** 0.5 if is_gaussian else config.adaptation.bandwidth,
        reach=float(fit.log_reach.exp()) * typical**0.5,
        bias=config.adaptation.bias,
        metric=[float(number) for number in fit.log_metric_d.exp()],
        stream=stream,
        examples=examples,
        losses=found,
    )
