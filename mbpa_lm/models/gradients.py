"""Reading on with gradients: through the tokens that are read now, and not through what was read before."""

import copy

import torch
from torch import Tensor

from mbpa_lm.models.base import LanguageModel, ModelOutput, State


def read_with_gradients(model: LanguageModel, tokens_BT: Tensor, state: State | None) -> tuple[ModelOutput, State]:
    """Read tokens after a state, which stays as it is; return what they give, and the state after them, without a graph.

    An LSTM lets no gradient through the state that it is given. A transformer's state holds the graph, and grows as the model
    reads on from it; it is made again without one.
    """
    output = model(tokens_BT, copy.deepcopy(state))
    if model.carries_state_in_training:
        return output, tuple(tensor.detach() for tensor in output.state)
    with torch.no_grad():
        return output, model(tokens_BT, copy.deepcopy(state)).state
