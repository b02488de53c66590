"""What every language model here offers: tokens and a state in, hidden states and a new state out, an output layer.

Dimensions: `B` sequences side by side, `T` tokens, `d` hidden size, `V` vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mbpa_lm.numerics.softcap import capped

State = Any
"""What a model carries from one piece of a stream to the next; only the model that made it looks inside."""


class OutputLayer(NamedTuple):
    """The linear map from hidden states to logits, as the live parameters of the model, and what caps them where it does."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    softcap: float | None = None  # c of a soft cap, c tanh(logit / c)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Map (..., d) to (..., V)."""
        return capped(torch.nn.functional.linear(hidden_states, self.weight, self.bias), self.softcap)


class ModelOutput(NamedTuple):
    """Hidden states of a piece of the stream."""

    hidden_states: Tensor  # (B, T, d): the input of the output layer after each token
    state: State
    penalty: Tensor  # (): what the model's own regularizers add to the training loss


class LanguageModel(Protocol):
    """A causal language model.

    `forward` reads (B, T) int64 tokens after what `state` has read; None is the state before the first token. It
    gives the same hidden states, up to rounding, however a stream is cut into pieces.
    """

    carries_state_in_training: bool
    vocabulary_size: int
    hidden_size: int

    def __call__(self, tokens: Tensor, state: State | None = None) -> ModelOutput: ...

    def output_layer(self) -> OutputLayer: ...
