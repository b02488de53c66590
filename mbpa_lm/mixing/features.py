"""What a gate may know before a token: cheap numbers that tell which expert to trust.

Dimensions: `C` positions of a chunk, `V` vocabulary, `d` hidden size, `F` features.
"""

import math

import torch
from torch import Tensor

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
    top = base_CV.max(dim=1)
    rows_C = torch.arange(first, first + len(base_CV), device=base_CV.device, dtype=base_CV.dtype)
    found_CF = base_CV.new_zeros(len(base_CV), len(FEATURES))
    # Not in a compiled loop: in the process that compiles it Numba rounds otherwise, and a gate remembers every rounding.
    found_CF[:, 0] = -(base_CV.exp() * base_CV).sum(dim=1)
    found_CF[:, 1] = top.values
    found_CF[:, 3] = torch.log1p(rows_C)
    if chunk.neighbours is not None:
        present_CK = chunk.neighbours.positions >= 0
        values_CK = chunk.neighbours.entries.values
        counts_C = present_CK.sum(1).clamp(min=1)
        nearest_C = chunk.neighbours.squared_distances[:, 0]
        found_CF[:, 2] = torch.where(present_CK[:, 0], nearest_C.clamp(min=1e-6).log(), math.log(1e-6))
        found_CF[:, 4] = ((values_CK == values_CK[:, :1]) & present_CK).sum(1) / counts_C
        found_CF[:, 5] = ((values_CK == top.indices[:, None]) & present_CK).sum(1) / counts_C
    along_Cn = chunk.hidden_states @ directions_dn
    found_CF[:, FIRST_DIRECTION : FIRST_DIRECTION + along_Cn.shape[1]] = along_Cn
    return found_CF
