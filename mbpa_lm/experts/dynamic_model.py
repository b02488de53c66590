"""Dynamic evaluation (Krause et al. 2018, arXiv 1709.07432): the whole model goes on learning from the stream it predicts.

After every `interval` positions all parameters theta' take one step on the mean loss of those positions, with gradients through
those positions only, and a step back to the trained parameters theta:

    sgd:  theta' <- theta' - rate g + decay (theta - theta')
    rms:  theta' <- theta' - rate g / (s + smoothing) + decay s (theta - theta'),    s = rms / mean(rms)

where in the second g is divided by mean(rms), and rms is the root mean square of each parameter's gradient on the training
text; the mean is over all parameters of the model. A step back never goes beyond theta.

Dimensions: `n` positions, `V` vocabulary.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mbpa_lm.adaptation.slow_weights import SlowRule, pull
from mbpa_lm.errors import AdaptationError
from mbpa_lm.models.base import State
from mbpa_lm.models.build import Model
from mbpa_lm.models.gradients import read_with_gradients


@dataclass(frozen=True)
class DynamicRule:
    """How fast the model learns and how fast it forgets."""

    interval: int  # positions between steps
    rate: float
    decay: float
    smoothing: float
    optimizer: Literal["sgd", "rms"]


class DynamicModel:
    """A copy of the model as the stream has left it so far."""

    def __init__(self, model: Model, rule: DynamicRule, scale: Mapping[str, Tensor]) -> None:
        """Args: scale holds the rms of each parameter's gradient by name; with sgd it is not asked for."""
        self._model = copy.deepcopy(model).eval()
        self._rule = rule
        self._trained = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._mean = mean_of_all(scale) if rule.optimizer == "rms" else 1.0
        self._scale = {
            name: scale[name] / self._mean if rule.optimizer == "rms" else torch.ones_like(parameter)
            for name, parameter in self._trained.items()
        }
        self._state: State | None = None  # before the positions since the last step
        self._seen: list[tuple[Tensor, Tensor]] = []  # inputs and targets since the last step

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters as they are now, by name."""
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def positions_to_next_step(self) -> int:
        """Return how many positions are predicted with the model as it is now."""
        return self._rule.interval - sum(len(inputs) for inputs, _ in self._seen)

    def log_probabilities(self, inputs_n: Tensor) -> Tensor:
        """Return the log-probabilities (n, V) after the next inputs, without learning from them."""
        read = torch.cat([*(inputs for inputs, _ in self._seen), inputs_n])
        with torch.no_grad():
            hidden_states = self._model(read[None], copy.deepcopy(self._state)).hidden_states[0][-len(inputs_n) :]
            return self._model.output_layer().logits(hidden_states).log_softmax(dim=-1)

    def score(self, inputs_n: Tensor, targets_n: Tensor) -> Tensor:
        """Return the log-probabilities (n,) of the targets after the next inputs, and learn from them once they are made.

        Raises AdaptationError where they are not finite.
        """
        found = []
        begin = 0
        while begin < len(inputs_n):
            left = self.positions_to_next_step()
            piece, before = slice(begin, min(len(inputs_n), begin + left)), self._rule.interval - left
            self._seen.append((inputs_n[piece], targets_n[piece]))
            inputs, targets = (torch.cat(column) for column in zip(*self._seen, strict=True))
            complete = len(inputs) == self._rule.interval
            with torch.set_grad_enabled(complete):
                output, following = read_with_gradients(self._model, inputs[None], self._state)
                logits = self._model.output_layer().logits(output.hidden_states[0])
                losses = cross_entropy(logits, targets, reduction="none")
                loss = losses.mean()
            found.append(-losses.detach()[before:])
            if not bool(torch.isfinite(found[-1]).all()):
                raise AdaptationError(f"dynamic evaluation diverged with dynamic.rate {self._rule.rate}; make it smaller")
            if complete:
                self._state = following
                self._step(loss)
                self._seen = []
            begin = piece.stop
        return torch.cat(found)

    def _step(self, loss: Tensor) -> None:
        parameters = dict(self._model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        rule = self._rule
        # With a scale of one everywhere and no smoothing, the rule of the slow weights is SGD.
        smoothing = rule.smoothing if rule.optimizer == "rms" else 0.0
        slow_rule = SlowRule(rule.interval, rule.rate, rule.decay, smoothing)
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    pull(
                        parameter.detach(),
                        self._trained[name],
                        gradient.contiguous(),
                        self._scale[name],
                        slow_rule,
                        1 / self._mean,
                    )


def mean_of_all(scale: Mapping[str, Tensor]) -> float:
    """Return the mean over all numbers of all parameters; 1 where it is 0."""
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in scale.values())
    return total / sum(tensor.numel() for tensor in scale.values()) or 1.0
