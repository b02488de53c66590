"""Persistent adaptation: a copy of the softmax layer that learns slowly from the stream and keeps what it learnt.

Dynamic evaluation (Krause et al. 2018, arXiv 1709.07432) restricted to the output layer. After every `interval` positions of
the stream the layer theta' takes one step on the mean loss of those positions, and a step back to the trained layer theta:

    theta' <- theta' - rate g / (s + smoothing) + decay s (theta - theta'),    s = rms / mean(rms)

where g is the gradient divided by mean(rms), and rms the root mean square of each parameter's gradient on the training text:
what moves much in training is drawn back more and pushed less. The schedule counts positions, so that chunks of any length
give the same result.

Dimensions: `n` positions, `V` vocabulary, `d` hidden size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn.functional import linear

from mbpa_lm.adaptation.problem import at_least_single, normalize, pick
from mbpa_lm.errors import AdaptationError
from mbpa_lm.numerics.compiled import can_take, compiled_loop

ROWS_AT_ONCE = 2048
"""Words whose gradients are used while they are still in the processor's cache."""


@dataclass(frozen=True)
class SlowRule:
    """How fast the layer learns and how fast it forgets."""

    interval: int  # positions between steps
    rate: float
    decay: float
    smoothing: float


@dataclass(frozen=True)
class GradientScale:
    """Root mean square of each parameter's gradient on the training text."""

    weight_Vd: Tensor
    bias_V: Tensor | None


class GradientStatistics:
    """Gathers the scale from pieces of the training text, each as long as the interval between slow steps."""

    def __init__(self, weight_Vd: Tensor, bias_V: Tensor | None) -> None:
        self._layer = at_least_single(weight_Vd.detach()), None if bias_V is None else at_least_single(bias_V.detach())
        self._squares_Vd = torch.zeros_like(self._layer[0])
        self._squares_V = None if bias_V is None else torch.zeros_like(self._layer[0][:, 0])
        self._count = 0

    def add(self, hidden_states_nd: Tensor, targets_n: Tensor) -> None:
        """Add the gradient of the mean loss of a piece."""
        hidden_states_nd = at_least_single(hidden_states_nd)
        gradients_nV = torch.softmax(linear(hidden_states_nd, *self._layer), dim=-1)
        gradients_nV[torch.arange(len(targets_n), device=targets_n.device), targets_n] -= 1
        gradients_nV /= len(targets_n)
        gradient_Vd = torch.mm(gradients_nV.T, hidden_states_nd)
        self._squares_Vd.addcmul_(gradient_Vd, gradient_Vd)
        if self._squares_V is not None:
            self._squares_V += gradients_nV.sum(0).square_()
        self._count += 1

    def scale(self) -> GradientScale:
        """Return the root mean square so far; at least one piece must have been added."""
        bias_V = None if self._squares_V is None else (self._squares_V / self._count).sqrt()
        return GradientScale((self._squares_Vd / self._count).sqrt(), bias_V)


class SlowWeights:
    """The layer as the stream has left it so far."""

    def __init__(self, weight_Vd: Tensor, bias_V: Tensor | None, rule: SlowRule, scale: GradientScale) -> None:
        self._trained_Vd = at_least_single(weight_Vd.detach())
        self._trained_V = None if bias_V is None else at_least_single(bias_V.detach())
        self.weight_Vd = self._trained_Vd.clone()
        self.bias_V = None if self._trained_V is None else self._trained_V.clone()
        self._rule = rule
        mean = float(scale.weight_Vd.mean()) or 1.0
        self._mean = mean
        self._scale_Vd = scale.weight_Vd.to(self.weight_Vd) / mean
        self._scale_V = None if scale.bias_V is None else scale.bias_V.to(self.weight_Vd) / mean
        self._seen: list[tuple[Tensor, Tensor]] = []  # hidden states and gradients of the logits since the last step
        self._positions = 0

    def positions_to_next_step(self) -> int:
        """Return how many positions are predicted with the layer as it is now."""
        return self._rule.interval - self._positions

    def log_probabilities(self, hidden_states_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's log-probabilities (n, V) and log-partitions (n,)."""
        # For few rows this order of the factors is twice as fast on a CPU.
        logits_nV = (self.weight_Vd @ at_least_single(hidden_states_nd).T).T.contiguous()
        if self.bias_V is not None:
            logits_nV += self.bias_V
        return normalize(logits_nV)

    def learn(self, hidden_states_nd: Tensor, log_probabilities_nV: Tensor, targets_n: Tensor) -> None:
        """Take note of at most `positions_to_next_step` positions, and step where they complete an interval.

        Args: log-probabilities of this layer, which are used up. Raises AdaptationError where the loss is not finite.
        """
        if not bool(torch.isfinite(pick(log_probabilities_nV, targets_n)).all()):
            raise AdaptationError(f"persistent adaptation diverged with persistent.rate {self._rule.rate}; make it smaller")
        gradients_nV = log_probabilities_nV.exp_()
        gradients_nV[torch.arange(len(targets_n), device=targets_n.device), targets_n] -= 1
        self._seen.append((at_least_single(hidden_states_nd), gradients_nV))
        self._positions += len(targets_n)
        if self._positions == self._rule.interval:
            self._step()

    def _step(self) -> None:
        hidden_states_nd, gradients_nV = (torch.cat(column) for column in zip(*self._seen, strict=True))
        share = 1 / (self._mean * self._rule.interval)
        gradient_nd = torch.empty_like(self.weight_Vd[:ROWS_AT_ONCE])
        for begin in range(0, len(self.weight_Vd), ROWS_AT_ONCE):
            rows = slice(begin, min(begin + ROWS_AT_ONCE, len(self.weight_Vd)))
            gradient = torch.mm(gradients_nV[:, rows].T, hidden_states_nd, out=gradient_nd[: rows.stop - begin])
            pull(self.weight_Vd[rows], self._trained_Vd[rows], gradient, self._scale_Vd[rows], self._rule, share)
        if self.bias_V is not None and self._trained_V is not None and self._scale_V is not None:
            pull(self.bias_V, self._trained_V, gradients_nV.sum(0), self._scale_V, self._rule, share)
        self._seen, self._positions = [], 0


def pull(slow: Tensor, trained: Tensor, gradient: Tensor, scale: Tensor, rule: SlowRule, share: float) -> None:
    """Take the step of the module's docstring in place; the gradient is multiplied by `share`."""
    if can_take(slow):
        arrays = (tensor.numpy().reshape(len(slow), -1) for tensor in (slow, trained, gradient, scale))
        _pull_compiled(*arrays, rule.rate * share, rule.decay, rule.smoothing)
        return
    step = gradient.mul_(rule.rate * share).div_(scale + rule.smoothing)
    slow.sub_(trained).mul_(1 - (scale * rule.decay).clamp_(max=1)).add_(trained).sub_(step)


@compiled_loop
def _pull_compiled(
    slow: np.ndarray,
    trained: np.ndarray,
    gradient: np.ndarray,
    scale: np.ndarray,
    rate: float,
    decay: float,
    smoothing: float,
) -> None:
    kind = slow.dtype.type
    rate, decay, smoothing, one = kind(rate), kind(decay), kind(smoothing), kind(1)
    for row in prange(len(slow)):
        for column in range(slow.shape[1]):
            s = scale[row, column]
            away = slow[row, column] - trained[row, column]
            kept = away * (one - min(decay * s, one))
            slow[row, column] = trained[row, column] + kept - rate * gradient[row, column] / (s + smoothing)
