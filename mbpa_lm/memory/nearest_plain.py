"""The search for the nearest keys in PyTorch, on any device; see nearest.py.

Dimensions: `C` queries, `K` neighbours, `N` keys, `n` candidates, `d` hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPARE_CANDIDATES = 8
"""Candidates beyond K, so that rounding in the product cannot lose one of the K nearest."""

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Rounding of a squared distance that comes from a matrix product, as a share of the squared norms."""


@dataclass(frozen=True)
class Search:
    """Queries, and the stretch of the keys that each sees: query c the rows from begins[c] up to, not including, ends[c]."""

    keys_Nd: Tensor
    squared_norms_N: Tensor
    queries_Cd: Tensor
    begins_C: Tensor
    ends_C: Tensor

    def sees(self, rows_n: Tensor) -> Tensor:
        """Return (C, n) bool, which of the rows each query sees."""
        return (rows_n >= self.begins_C[:, None]) & (rows_n < self.ends_C[:, None])


def nearest_plain(search: Search, count: int, products_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `nearest` does in PyTorch, on any device."""
    keys_Nd, squared_norms_N, queries_Cd = search.keys_Nd, search.squared_norms_N, search.queries_Cd
    seen_CN = search.sees(torch.arange(len(keys_Nd), device=keys_Nd.device))
    half_CN = (squared_norms_N / 2 - products_CN).masked_fill(~seen_CN, math.inf)
    wanted = min(count + SPARE_CANDIDATES, len(keys_Nd))
    candidates = half_CN.topk(wanted, largest=False)
    rows_Cn = candidates.indices.masked_fill(candidates.values.isinf(), -1)
    rows_CK, distances_CK = choose(keys_Nd, queries_Cd, rows_Cn, count)
    if wanted == count + SPARE_CANDIDATES:
        norms_C = queries_Cd.square().sum(1)
        farthest_C = norms_C + 2 * candidates.values.amax(1)
        allowed_C = ROUNDING[keys_Nd.dtype] * (norms_C + squared_norms_N.amax())
        doubtful_C = (rows_Cn >= 0).all(1) & (farthest_C <= distances_CK[:, -1] + allowed_C)
        return measure_all(search, doubtful_C, rows_CK, distances_CK)
    return rows_CK, distances_CK


def measure_all(search: Search, doubtful_C: Tensor, rows_CK: Tensor, distances_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and distances with those of doubtful queries found again, among all keys that the query sees."""
    for query in doubtful_C.nonzero()[:, 0].tolist():
        begin, end = int(search.begins_C[query]), int(search.ends_C[query])
        visible = torch.arange(begin, end, device=rows_CK.device)[None]
        found = choose(search.keys_Nd, search.queries_Cd[query : query + 1], visible, rows_CK.shape[1])
        rows_CK[query], distances_CK[query] = found[0][0], found[1][0]
    return rows_CK, distances_CK


def copy_rounding(dtype: torch.dtype) -> float:
    """Return the squared distance, as a share of the squared norm, below which two states are one context, computed twice.

    A model's states differ in the last digits with the length of the chunk that it reads.
    """
    return (100 if dtype in (torch.float32, torch.float64) else 1) * torch.finfo(dtype).eps ** 2


def choose(keys_Nd: Tensor, queries_Cd: Tensor, rows_Cn: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose the nearest of the candidate rows (C, n), -1 for none, by distances computed directly."""
    if rows_Cn.shape[1] < count:
        rows_Cn = torch.nn.functional.pad(rows_Cn, (0, count - rows_Cn.shape[1]), value=-1)
    rows_Cn = rows_Cn.sort(dim=1, descending=True).values  # newer first, and kept so among equal distances
    differences_Cnd = keys_Nd[rows_Cn.clamp(min=0)] - queries_Cd[:, None]
    distances_Cn = differences_Cnd.square_().sum(-1)
    copies_Cn = distances_Cn <= copy_rounding(keys_Nd.dtype) * queries_Cd.square().sum(1, keepdim=True)
    distances_Cn = distances_Cn.masked_fill_(copies_Cn, 0).masked_fill_(rows_Cn < 0, math.inf)
    distances_Cn, order = distances_Cn.sort(dim=1, stable=True)
    return rows_Cn.gather(1, order)[:, :count], distances_Cn[:, :count]
