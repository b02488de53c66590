"""What a gate may know before a token: cheap numbers that tell which expert to trust.

Dimensions: `C` positions of a chunk, `V` vocabulary, `d` hidden size, `F` features.
"""

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mbpa_lm.compiled import can_take, compiled_loop, exponential
from mbpa_lm.experts.base import Chunk

DIRECTIONS = 4
MOST_ROWS = 20_000

FEATURES = (
    "entropy",
    "top_log_probability",
    "nearest_log_distance",
    "memory_log_size",
    "neighbours_agree",
    "neighbours_agree_with_base",
    *(f"direction_{number}" for number in range(1, DIRECTIONS + 1)),
)
"""Of the base softmax, in nats; of the nearest neighbour's squared distance; of the positions so far; shares of neighbours; the
hidden state along the directions in which the vocabulary's vectors differ most: roughly, which kind of word comes next."""

FIRST_DIRECTION = len(FEATURES) - DIRECTIONS


def principal_directions(weight_Vd: Tensor) -> Tensor:
    """Return the directions (d, DIRECTIONS) in which the output layer's rows differ most, of some thousands of its rows."""
    rows_nd = weight_Vd.detach()[:: -(-len(weight_Vd) // MOST_ROWS)].float()
    away_nd = rows_nd - rows_nd.mean(dim=0)
    _, vectors_dd = torch.linalg.eigh(away_nd.T @ away_nd)
    directions_dn: Tensor = vectors_dd[:, -DIRECTIONS:].flip(1).to(weight_Vd.dtype)
    return directions_dn


def features(chunk: Chunk, first: int, directions_dn: Tensor) -> Tensor:
    """Return the features (C, F) of a chunk whose first position is `first` in the stream; those of no memory are 0.

    Args: directions from `principal_directions`.
    """
    base_CV = chunk.base_log_probabilities
    entropies_C, likeliest_C, top_C = _of_distributions(base_CV)
    rows_C = torch.arange(first, first + len(base_CV), device=base_CV.device, dtype=base_CV.dtype)
    found_CF = base_CV.new_zeros(len(base_CV), len(FEATURES))
    found_CF[:, 0], found_CF[:, 1] = entropies_C, top_C
    found_CF[:, 3] = torch.log1p(rows_C)
    if chunk.neighbours is not None:
        present_CK = chunk.neighbours.positions >= 0
        values_CK = chunk.neighbours.entries.values
        counts_C = present_CK.sum(1).clamp(min=1)
        nearest_C = chunk.neighbours.squared_distances[:, 0]
        found_CF[:, 2] = torch.where(present_CK[:, 0], nearest_C.clamp(min=1e-6).log(), math.log(1e-6))
        found_CF[:, 4] = ((values_CK == values_CK[:, :1]) & present_CK).sum(1) / counts_C
        found_CF[:, 5] = ((values_CK == likeliest_C[:, None]) & present_CK).sum(1) / counts_C
    along_Cn = chunk.hidden_states @ directions_dn
    found_CF[:, FIRST_DIRECTION : FIRST_DIRECTION + along_Cn.shape[1]] = along_Cn
    return found_CF


def _of_distributions(log_probabilities_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entropies (C,), the likeliest words (C,) int64 and their log-probabilities (C,)."""
    if can_take(log_probabilities_CV) and log_probabilities_CV.dtype == torch.float32:
        entropies_C, top_C = torch.empty(2, len(log_probabilities_CV))
        likeliest_C = torch.empty(len(log_probabilities_CV), dtype=torch.int64)
        _look(*(tensor.numpy() for tensor in (log_probabilities_CV, entropies_C, likeliest_C, top_C)))
        return entropies_C, likeliest_C, top_C
    top = log_probabilities_CV.max(dim=1)
    return -(log_probabilities_CV.exp() * log_probabilities_CV).sum(dim=1), top.indices, top.values


@compiled_loop
def _look(log_probabilities: np.ndarray, entropies: np.ndarray, likeliest: np.ndarray, top: np.ndarray) -> None:
    """Set entropies, likeliest words and their log-probabilities (C,) from float32 log-probabilities (C, V)."""
    for row in prange(len(log_probabilities)):
        total, largest = np.float32(0), np.float32(-np.inf)
        for word in range(log_probabilities.shape[1]):
            number = log_probabilities[row, word]
            total -= exponential(number) * number
            largest = max(largest, number)
        entropies[row], top[row] = total, largest
        for word in range(log_probabilities.shape[1] - 1, -1, -1):
            if log_probabilities[row, word] == largest:
                likeliest[row] = word
