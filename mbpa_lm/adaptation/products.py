"""Products of keys with chosen rows of a table, which are read where they lie: no (B, S, d) copy of the rows is made.

Dimensions: `B` queries, `K` neighbours, `S` chosen rows, `V` rows of the table, `d` hidden size.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mbpa_lm.adaptation.problem import Problem, at_least_single
from mbpa_lm.numerics.compiled import can_take, compiled_loop


def products_with_rows(keys_BKd: Tensor, table_Vd: Tensor, rows_BS: Tensor, symmetric: bool = False) -> Tensor:
    """Return keys[b] @ table[rows[b]].T as (B, K, S), in the keys' dtype or float32 if that is shorter.

    With `symmetric` the caller says that the rows are the keys themselves, which halves the work.
    """
    if not can_take(table_Vd) or table_Vd.dtype != keys_BKd.dtype:
        chosen_BSd = at_least_single(table_Vd.index_select(0, rows_BS.flatten())).view(*rows_BS.shape, -1)
        return at_least_single(keys_BKd) @ chosen_BSd.mT
    products_BKS = keys_BKd.new_empty(*keys_BKd.shape[:2], rows_BS.shape[1])
    tensors = (keys_BKd.contiguous(), table_Vd.detach().contiguous(), rows_BS.contiguous(), products_BKS)
    _multiply(*(tensor.numpy() for tensor in tensors), symmetric)
    return products_BKS


def span_products(problem: Problem, adapt_bias: bool) -> tuple[Tensor, Tensor]:
    """Return g (B, K), the scalar products of the keys with the query, and G (B, K, K), those of the keys with each other.

    A bias that is adapted is the weight of one more input that is always 1.
    """
    one = 1.0 if adapt_bias and problem.bias_V is not None else 0.0
    towards_BK = (problem.queries_Bd[:, None] @ problem.keys_BKd.mT)[:, 0]
    return towards_BK + one, gram(problem.keys_BKd) + one


def gram(keys_BKd: Tensor) -> Tensor:
    """Return keys[b] @ keys[b].T as (B, K, K)."""
    B, K = keys_BKd.shape[:2]
    return products_with_rows(keys_BKd, keys_BKd.flatten(0, 1), torch.arange(B * K, device=keys_BKd.device).view(B, K), True)


@compiled_loop
def _multiply(keys: np.ndarray, table: np.ndarray, rows: np.ndarray, products: np.ndarray, symmetric: bool) -> None:
    """Fill in the products, four keys by three rows at a time: twelve sums that stay in registers.

    Where fewer are left, the last one is taken again, and written again.
    """
    neighbours, size = keys.shape[1], keys.shape[2]
    chosen = rows.shape[1]
    for query in prange(len(keys)):
        for s in range(0, chosen, 3):
            s1, s2 = min(s + 1, chosen - 1), min(s + 2, chosen - 1)
            r0, r1, r2 = rows[query, s], rows[query, s1], rows[query, s2]
            for k in range(0, s2 + 1 if symmetric else neighbours, 4):
                k1, k2, k3 = min(k + 1, neighbours - 1), min(k + 2, neighbours - 1), min(k + 3, neighbours - 1)
                a00 = a01 = a02 = a10 = a11 = a12 = a20 = a21 = a22 = a30 = a31 = a32 = keys.dtype.type(0)
                for i in range(size):
                    w0, w1, w2 = table[r0, i], table[r1, i], table[r2, i]
                    h0, h1, h2, h3 = keys[query, k, i], keys[query, k1, i], keys[query, k2, i], keys[query, k3, i]
                    a00, a01, a02 = a00 + h0 * w0, a01 + h0 * w1, a02 + h0 * w2
                    a10, a11, a12 = a10 + h1 * w0, a11 + h1 * w1, a12 + h1 * w2
                    a20, a21, a22 = a20 + h2 * w0, a21 + h2 * w1, a22 + h2 * w2
                    a30, a31, a32 = a30 + h3 * w0, a31 + h3 * w1, a32 + h3 * w2
                products[query, k, s], products[query, k, s1], products[query, k, s2] = a00, a01, a02
                products[query, k1, s], products[query, k1, s1], products[query, k1, s2] = a10, a11, a12
                products[query, k2, s], products[query, k2, s1], products[query, k2, s2] = a20, a21, a22
                products[query, k3, s], products[query, k3, s1], products[query, k3, s2] = a30, a31, a32
        if symmetric:
            for k in range(neighbours):
                for s in range(k):
                    products[query, k, s] = products[query, s, k]
