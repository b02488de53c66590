"""Similarity of a neighbour to the query, and the weights that follow from it.

Kernels return log-similarities, so that weights come from one stable softmax: a neighbour at distance 0 and one too far
to count are both finite cases. Dimensions: `B` queries, `K` neighbours.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor], Tensor]
"""Maps squared distances to log-similarities; inf, an empty place, to -inf."""


def inverse_distance(epsilon: float) -> Kernel:
    """Return the paper's kernel, 1 / (epsilon + ||h - q||^2)."""
    return lambda squared_distances: -torch.log(epsilon + squared_distances)


def gaussian(bandwidth: float) -> Kernel:
    """Return exp(- ||h - q||^2 / (2 bandwidth^2))."""
    return lambda squared_distances: -squared_distances / (2 * bandwidth**2)


def neighbour_weights(log_similarities_BK: Tensor) -> Tensor:
    """Return kern(h_k, q) / sum_j kern(h_j, q) as (B, K); zeros for a query with no neighbour at all."""
    alone = log_similarities_BK.amax(dim=1, keepdim=True) == -math.inf
    return torch.softmax(log_similarities_BK.masked_fill(alone, 0.0), dim=1).masked_fill(alone, 0.0)
