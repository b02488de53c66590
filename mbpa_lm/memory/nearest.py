"""The K nearest keys of each query, exactly, where every query sees another stretch of the keys.

One matrix product gives half squared distances up to rounding and up to a constant a query; the K nearest by them, and some
to spare, are measured again directly, and the nearest of those chosen. Where more keys than the spare ones lie at one distance
up to rounding, copies of one context for example, that query is measured against every key that it sees. So the result depends
neither on the rounding of the product nor on which queries were asked together. Equally near keys come newest first, and keys
that differ from the query by no more than rounding are at distance 0.

Dimensions: `C` queries, `K` neighbours, `N` keys, `d` hidden size.
"""

import math

import torch
from torch import Tensor

from mbpa_lm.compiled import can_take
from mbpa_lm.memory.nearest_compiled import search

SPARE_CANDIDATES = 8
"""Candidates beyond K, so that rounding in the product cannot lose one of the K nearest."""

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Rounding of a squared distance that comes from a matrix product, as a share of the squared norms."""


def nearest(
    keys_Nd: Tensor,
    squared_norms_N: Tensor,
    queries_Cd: Tensor,
    begins_C: Tensor,
    ends_C: Tensor,
    count: int,
    products_CN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rows (C, K) int64 of the nearest keys and their squared distances (C, K), nearest first.

    Query c sees the rows from begins[c] up to, not including, ends[c]. Where that is fewer than K, the last rows are -1 and
    their distances inf. Products of queries and keys are made where they are not given.
    """
    products_CN = queries_Cd @ keys_Nd.T if products_CN is None else products_CN
    find = nearest_compiled if can_take(keys_Nd) else nearest_plain
    return find(keys_Nd, squared_norms_N, queries_Cd, begins_C, ends_C, count, products_CN)


def nearest_compiled(
    keys_Nd: Tensor,
    squared_norms_N: Tensor,
    queries_Cd: Tensor,
    begins_C: Tensor,
    ends_C: Tensor,
    count: int,
    products_CN: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do what `nearest` does on a CPU, in one pass over the products."""
    rows_CK = torch.empty(len(queries_Cd), count, dtype=torch.int64)
    distances_CK = torch.empty(len(queries_Cd), count, dtype=keys_Nd.dtype)
    inputs = (keys_Nd, squared_norms_N, queries_Cd.contiguous(), begins_C, ends_C, products_CN)
    arrays = [tensor.numpy() for tensor in inputs]
    roundings = (ROUNDING[keys_Nd.dtype], _copy_rounding(keys_Nd.dtype))
    search(*arrays, count + SPARE_CANDIDATES, *roundings, rows_CK.numpy(), distances_CK.numpy())
    return rows_CK, distances_CK


def nearest_plain(
    keys_Nd: Tensor,
    squared_norms_N: Tensor,
    queries_Cd: Tensor,
    begins_C: Tensor,
    ends_C: Tensor,
    count: int,
    products_CN: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do what `nearest` does in PyTorch, on any device."""
    rows_N = torch.arange(len(keys_Nd), device=keys_Nd.device)
    seen_CN = (rows_N >= begins_C[:, None]) & (rows_N < ends_C[:, None])
    half_CN = (squared_norms_N / 2 - products_CN).masked_fill(~seen_CN, math.inf)
    wanted = min(count + SPARE_CANDIDATES, len(keys_Nd))
    candidates = half_CN.topk(wanted, largest=False)
    rows_Cn = candidates.indices.masked_fill(candidates.values.isinf(), -1)
    rows_CK, distances_CK = _choose(keys_Nd, queries_Cd, rows_Cn, count)
    if wanted == count + SPARE_CANDIDATES:
        norms_C = queries_Cd.square().sum(1)
        farthest_C = norms_C + 2 * candidates.values.amax(1)
        allowed_C = ROUNDING[keys_Nd.dtype] * (norms_C + squared_norms_N.amax())
        doubtful_C = (rows_Cn >= 0).all(1) & (farthest_C <= distances_CK[:, -1] + allowed_C)
        for query in doubtful_C.nonzero()[:, 0].tolist():
            visible = torch.arange(int(begins_C[query]), int(ends_C[query]), device=keys_Nd.device)[None]
            found = _choose(keys_Nd, queries_Cd[query : query + 1], visible, count)
            rows_CK[query], distances_CK[query] = found[0][0], found[1][0]
    return rows_CK, distances_CK


def _copy_rounding(dtype: torch.dtype) -> float:
    """Return the squared distance, as a share of the squared norm, below which two states are one context, computed twice.

    A model's states differ in the last digits with the length of the chunk that it reads.
    """
    return (100 if dtype in (torch.float32, torch.float64) else 1) * torch.finfo(dtype).eps ** 2


def _choose(keys_Nd: Tensor, queries_Cd: Tensor, rows_Cn: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose the nearest of the candidate rows (C, n), -1 for none, by distances computed directly."""
    if rows_Cn.shape[1] < count:
        rows_Cn = torch.nn.functional.pad(rows_Cn, (0, count - rows_Cn.shape[1]), value=-1)
    rows_Cn = rows_Cn.sort(dim=1, descending=True).values  # newer first, and kept so among equal distances
    differences_Cnd = keys_Nd[rows_Cn.clamp(min=0)] - queries_Cd[:, None]
    distances_Cn = differences_Cnd.square_().sum(-1)
    copies_Cn = distances_Cn <= _copy_rounding(keys_Nd.dtype) * queries_Cd.square().sum(1, keepdim=True)
    distances_Cn = distances_Cn.masked_fill_(copies_Cn, 0).masked_fill_(rows_Cn < 0, math.inf)
    distances_Cn, order = distances_Cn.sort(dim=1, stable=True)
    return rows_Cn.gather(1, order)[:, :count], distances_Cn[:, :count]
