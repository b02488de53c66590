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

from mbpa_lm.memory.nearest_compiled import fill_in_nearest
from mbpa_lm.memory.nearest_faiss import has_gpu_build, nearest_faiss
from mbpa_lm.memory.nearest_plain import ROUNDING, SPARE_CANDIDATES, Search, copy_rounding, nearest_plain
from mbpa_lm.numerics.compiled import can_take


def nearest(search: Search, count: int, products_CN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return rows (C, K) int64 of the nearest keys and their squared distances (C, K), nearest first.

    Where a query sees fewer than K, the last rows are -1 and their distances inf. Products of queries and keys are made where
    they are not given.
    """
    keys_Nd, queries_Cd = search.keys_Nd, search.queries_Cd
    if not len(keys_Nd):
        nothing = search.begins_C.new_full((len(queries_Cd), count), -1)
        return nothing, queries_Cd.new_full(nothing.shape, math.inf)
    if products_CN is None and keys_Nd.is_cuda and keys_Nd.dtype == torch.float32 and has_gpu_build():
        return nearest_faiss(search, count)
    products_CN = queries_Cd @ keys_Nd.T if products_CN is None else products_CN
    find = nearest_compiled if can_take(keys_Nd) else nearest_plain
    return find(search, count, products_CN)


def nearest_compiled(search: Search, count: int, products_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `nearest` does on a CPU, in one pass over the products."""
    keys_Nd, queries_Cd = search.keys_Nd, search.queries_Cd.contiguous()
    rows_CK = torch.empty(len(queries_Cd), count, dtype=torch.int64)
    distances_CK = torch.empty(len(queries_Cd), count, dtype=keys_Nd.dtype)
    inputs = (keys_Nd, search.squared_norms_N, queries_Cd, search.begins_C, search.ends_C, products_CN)
    arrays = [tensor.numpy() for tensor in inputs]
    roundings = (ROUNDING[keys_Nd.dtype], copy_rounding(keys_Nd.dtype))
    fill_in_nearest(*arrays, count + SPARE_CANDIDATES, *roundings, rows_CK.numpy(), distances_CK.numpy())
    return rows_CK, distances_CK
