"""Similarity of a neighbour to the query, and the weights that follow from it.

Kernels return log-similarities, so that weights come from one stable softmax: a neighbour at distance 0 and one too far
to count are both finite cases. Their parameters may be tensors, through which gradients flow. Dimensions: `B` queries,
`K` neighbours, `d` hidden size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor], Tensor]
"""Maps squared distances to log-similarities; inf, an empty place, to -inf."""

Weighting = Callable[[Tensor], Tensor]
"""Maps squared distances (B, K) to the weights of the neighbours (B, K); inf, an empty place, to 0."""


def inverse_distance(epsilon: float | Tensor) -> Kernel:
    """Return the paper's kernel, 1 / (epsilon + ||h - q||^2)."""
    return lambda squared_distances: -torch.log(epsilon + squared_distances)


def gaussian(bandwidth: float | Tensor) -> Kernel:
    """Return exp(- ||h - q||^2 / (2 bandwidth^2))."""
    return lambda squared_distances: -squared_distances / (2 * bandwidth**2)


def normalized(kernel: Kernel) -> Weighting:
    """Return the paper's weights, kern(h_k, q) / sum_j kern(h_j, q): the neighbours pull 1 in total, however far they are."""

    def weigh(squared_distances_BK: Tensor) -> Tensor:
        log_similarities_BK = _log_similarities(kernel, squared_distances_BK)
        alone = log_similarities_BK.amax(dim=1, keepdim=True) == -math.inf
        return torch.softmax(log_similarities_BK.masked_fill(alone, 0.0), dim=1).masked_fill(alone, 0.0)

    return weigh


def within_reach(kernel: Kernel, reach: float | Tensor) -> Weighting:
    """Return kern(h_k, q) / (kern at distance reach + sum_j kern(h_j, q)): neighbours far beyond `reach` hardly pull at all.

    It is as if one more neighbour, at that distance, asked for no change.
    """

    def weigh(squared_distances_BK: Tensor) -> Tensor:
        at_reach_B1 = torch.as_tensor(reach, dtype=squared_distances_BK.dtype, device=squared_distances_BK.device).square()
        with_one_more = torch.cat([squared_distances_BK, at_reach_B1.expand(len(squared_distances_BK), 1)], dim=1)
        return torch.softmax(_log_similarities(kernel, with_one_more), dim=1)[:, :-1]

    return weigh


def unnormalized(kernel: Kernel) -> Weighting:
    """Return kern(h_k, q) / kern(q, q): every near neighbour pulls up to 1, and many near ones pull more than one."""

    def weigh(squared_distances_BK: Tensor) -> Tensor:
        at_zero = kernel(torch.zeros_like(squared_distances_BK))
        return (_log_similarities(kernel, squared_distances_BK) - at_zero).exp()

    return weigh


def _log_similarities(kernel: Kernel, squared_distances: Tensor) -> Tensor:
    """Return the kernel's log-similarities; empty places stay out of its arithmetic, where inf would make gradients NaN."""
    empty = squared_distances.isinf()
    return kernel(squared_distances.masked_fill(empty, 0.0)).masked_fill(empty, -math.inf)


def stretched_distances(keys_BKd: Tensor, queries_Bd: Tensor, metric_d: Tensor) -> Tensor:
    """Return sum_i metric_i (h_i - q_i)^2 as (B, K)."""
    return ((keys_BKd - queries_Bd[:, None]).square() * metric_d).sum(-1)
