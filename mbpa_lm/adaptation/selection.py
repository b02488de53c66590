"""Neighbours chosen for what they tell together, not only for nearness (SIFT: Hübotter et al. 2025, arXiv 2410.08020).

The nearest entries are often copies of one context, and the second copy tells little. In SIFT's model, a Gaussian process over
hidden states with the linear kernel of normalized states, the uncertainty at the query after observing the set X under noise is

    sigma^2(q | X) = k(q, q) - k(q, X) (K_X + noise I)^-1 k(X, q),

and the set is built greedily: the next neighbour is the candidate that lowers it most. A second copy of a context then comes in
only when it lowers the uncertainty more than anything else.

Dimensions: `B` queries, `n` candidates, `K` neighbours, `d` hidden size.
"""

import torch
from torch import Tensor


def most_informative(keys_Bnd: Tensor, queries_Bd: Tensor, present_Bn: Tensor, count: int, noise: float = 0.01) -> Tensor:
    """Choose `count` candidates: their columns (B, K), those that are not present last.

    Args: present (B, n) bool; noise is the variance of an observation, that of a hidden state itself being 1.
    """
    states_Bmd = torch.nn.functional.normalize(torch.cat([keys_Bnd, queries_Bd[:, None]], dim=1), dim=-1)
    covariances_Bmm = states_Bmd @ states_Bmd.mT  # of the candidates and, last, the query, given what is chosen so far
    columns, rows = [], torch.arange(len(keys_Bnd), device=keys_Bnd.device)
    taken_Bn = torch.zeros_like(present_Bn)
    for _ in range(min(count, present_Bn.shape[1])):
        variances_Bm = covariances_Bmm.diagonal(dim1=1, dim2=2)
        gains_Bn = covariances_Bmm[:, -1, :-1].square() / (variances_Bm[:, :-1] + noise)
        gains_Bn = gains_Bn.masked_fill(~present_Bn, -1.0).masked_fill(taken_Bn, -2.0)
        chosen_B = gains_Bn.argmax(dim=1)
        columns.append(chosen_B)
        taken_Bn[rows, chosen_B] = True
        column_Bm = covariances_Bmm[rows, :, chosen_B]
        scaled_Bm = column_Bm / (variances_Bm[rows, chosen_B] + noise)[:, None]
        covariances_Bmm = torch.baddbmm(covariances_Bmm, scaled_Bm[..., None], column_Bm[:, None], alpha=-1)
    return torch.stack(columns, dim=1)
