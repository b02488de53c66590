"""What training minimises: the mean loss of a batch and the model's own penalty, as one module.

One module, so that everything that reads weights happens inside its `forward`: that is where data-parallel wrappers put the
weights of a sharded model together.

Dimensions: `B` sequences side by side, `T` tokens, `N` = B T positions, `V` vocabulary, `d` hidden size.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mbpa_lm.models.base import State
from mbpa_lm.models.build import Model
from mbpa_lm.models.lstm import LSTMLanguageModel
from mbpa_lm.system.processes import Processes
from mbpa_lm.training.chunked_softmax import chunked_cross_entropy, target_losses
from mbpa_lm.training.sampled_softmax import sampled_cross_entropy


class Objective(NamedTuple):
    """The losses of a batch, in nats."""

    loss: Tensor  # (): the mean over positions; in evaluation (N,), each position's
    penalty: Tensor  # ()
    state: State
    hidden_states: Tensor  # (N, d), without a gradient


class TrainingObjective(nn.Module):
    """A model and its loss: sampled where `inclusion` (V,) says with what probability a word is drawn, else the whole softmax.

    In evaluation mode it is always the whole softmax.
    """

    def __init__(self, model: Model, inclusion: Tensor | None, precision: str, processes: Processes) -> None:
        super().__init__()
        self.model, self.precision, self.processes = model, precision, processes
        if isinstance(model, LSTMLanguageModel):
            model.share = (processes.rank, processes.count)
        self.inclusion = None if inclusion is None else inclusion.to(processes.device)

    def forward(self, tokens: Tensor, targets: Tensor, state: State = None) -> Objective:
        """Read (B, T) int64 tokens after `state`, whose next tokens are `targets`."""
        device = tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            with nullcontext() if isinstance(self.model, LSTMLanguageModel) else self.processes.own_randomness():
                output = self.model(tokens, state)
            hidden_states = output.hidden_states.flatten(0, 1)
            layer, targets = self.model.output_layer(), targets.flatten()
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
            if not self.training:
                loss = target_losses(layer, hidden_states, targets, dtype)
            elif self.inclusion is not None:
                loss = sampled_cross_entropy(layer, hidden_states, targets, self.inclusion).mean()
            else:
                loss = chunked_cross_entropy(layer, hidden_states, targets, dtype)
        return Objective(loss, output.penalty, output.state, hidden_states.detach())
