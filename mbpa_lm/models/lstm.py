"""AWD-LSTM (Merity et al. 2018, arXiv 1708.02182): a stateful LSTM with the regularizers that made it strong.

Masks are drawn once a sequence and used at each of its steps (variational dropout, Gal and Ghahramani 2016): on
the input vectors, on every layer's output, on whole words, and on recurrent weights. Activations can be penalised
for their size and for their change over time. Between pieces of a stream the state is carried, without its gradient.

Dimensions: `B` sequences side by side, `T` tokens, `d` hidden size of the output layer, `V` vocabulary.
"""

import torch
from torch import Tensor, nn

from mbpa_lm.config import ModelConfig
from mbpa_lm.models.base import ModelOutput, OutputLayer

LSTMState = tuple[Tensor, ...]
"""h and c of the first layer, h and c of the second, ...; each (1, B, units)."""

INITIAL_RANGE = 0.1
LONGEST = 1 << 15
"""Tokens that a layer reads at once: cuDNN takes no sequences of more than twice as many."""


class LSTMLanguageModel(nn.Module):
    """A stack of LSTM layers between an embedding and an output layer, tied or not."""

    carries_state_in_training = True

    share: tuple[int, int] = (0, 1)
    """Which of how many equal groups of a batch's sequences this process reads: masks are drawn for the sequences of all."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        embedding_size = config.embedding_size or config.hidden_size
        last_size = embedding_size if config.tied else config.hidden_size
        sizes = [embedding_size, *[config.hidden_size] * (config.layers - 1), last_size]
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.hidden_size = last_size
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.layers = nn.ModuleList(nn.LSTM(sizes[i], sizes[i + 1]) for i in range(config.layers))
        self.output = nn.Linear(last_size, vocabulary_size)
        nn.init.uniform_(self.embedding.weight, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.uniform_(self.output.weight, -INITIAL_RANGE, INITIAL_RANGE)
        nn.init.zeros_(self.output.bias)
        if config.tied:
            self.output.weight = self.embedding.weight

    def output_layer(self) -> OutputLayer:
        return OutputLayer(self.output.weight, self.output.bias)

    def forward(self, tokens: Tensor, state: LSTMState | None = None) -> ModelOutput:
        config = self.config
        hidden = self._embed(tokens.T)  # (T, B, embedding)
        new_state: list[Tensor] = []
        hidden_dropout = config.dropout if config.hidden_dropout is None else config.hidden_dropout
        raw = hidden
        for index, layer in enumerate(self.layers):
            hidden = self._drop_units(hidden, config.input_dropout if index == 0 else hidden_dropout)
            before = None if state is None else (state[2 * index].detach(), state[2 * index + 1].detach())
            raw, (h, c) = self._run_layer(layer, hidden, before)
            new_state += [h, c]
            hidden = raw
        hidden = self._drop_units(hidden, config.dropout)
        return ModelOutput(hidden.transpose(0, 1), tuple(new_state), self._penalty(raw, hidden))

    def _embed(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.embedding(tokens)
        if self.training and self.config.embedding_dropout > 0:
            mask = _mask((self.vocabulary_size, 1), self.config.embedding_dropout, vectors)
            vectors = vectors * mask[tokens]  # as if the words' rows were masked, without a copy of the table
        return vectors

    def _drop_units(self, hidden: Tensor, drop: float) -> Tensor:
        if not self.training or drop == 0:
            return hidden
        group, groups = self.share
        sequences, units = hidden.shape[1:]
        masks = _mask((1, groups * sequences, units), drop, hidden)
        return hidden * masks[:, group * sequences : (group + 1) * sequences]

    def _run_layer(
        self, layer: nn.Module, hidden: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert isinstance(layer, nn.LSTM)
        drop = self.config.weight_dropout
        if not self.training or drop == 0:
            outputs = []
            for piece in hidden.split(LONGEST):
                output, state = layer(piece, state)
                outputs.append(output)
            assert state is not None
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0], state
        weight_ih, weight_hh, bias_ih, bias_hh = layer.all_weights[0]
        weights = [weight_ih, nn.functional.dropout(weight_hh, drop), bias_ih, bias_hh]
        if state is None:
            zeros = hidden.new_zeros(1, hidden.shape[1], layer.hidden_size)
            state = (zeros, zeros)
        output, h, c = torch.lstm(hidden, state, weights, True, 1, 0.0, True, False, False)
        return output, (h, c)

    def _penalty(self, raw: Tensor, dropped: Tensor) -> Tensor:
        penalty = raw.new_zeros((), dtype=torch.float32)
        if self.training and self.config.activation_penalty:
            penalty = penalty + self.config.activation_penalty * dropped.float().pow(2).mean()
        if self.training and self.config.change_penalty and len(raw) > 1:
            penalty = penalty + self.config.change_penalty * (raw[1:] - raw[:-1]).float().pow(2).mean()
        return penalty


def _mask(shape: tuple[int, ...], drop: float, like: Tensor) -> Tensor:
    """Draw zeros with probability `drop` and 1 / (1 - drop) otherwise."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - drop).div_(1 - drop)
