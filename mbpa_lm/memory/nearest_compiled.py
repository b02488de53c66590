"""The inner loops of `nearest.py` on a CPU. `found` and `near` are the candidates' rows and distances, in any order."""

import numpy as np
from numba import prange

from mbpa_lm.numerics.compiled import compiled_loop, compiled_part
from mbpa_lm.numerics.largest_compiled import place_largest


@compiled_loop
def fill_in_nearest(
    keys: np.ndarray,
    squared_norms: np.ndarray,
    queries: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
    products: np.ndarray,
    wanted: int,
    rounding: float,
    copy_rounding: float,
    rows: np.ndarray,
    distances: np.ndarray,
) -> None:
    """Fill `rows` and `distances` (C, K) from products (C, N) of queries and keys; see `nearest.nearest`."""
    count = rows.shape[1]
    half_norms = squared_norms / 2
    largest_norm = squared_norms.max()
    for query in prange(len(queries)):
        found = np.empty(wanted, np.int64)
        near = np.empty(wanted, products.dtype)
        own_norm = (queries[query] ** 2).sum()
        copy = copy_rounding * own_norm
        kept = _scan(half_norms, products[query], begins[query], ends[query], found, near)
        farthest = near[:kept].max() if kept == wanted else near.dtype.type(np.inf)
        for place in range(kept):
            near[place] = _distance(keys[found[place]], queries[query], copy)
        _sort(near, found, kept)
        if kept == wanted and own_norm + 2 * farthest <= near[count - 1] + rounding * (own_norm + largest_norm):
            kept = _scan_directly(keys, queries[query], begins[query], ends[query], copy, found, near)
            _sort(near, found, kept)
        for place in range(count):
            rows[query, place] = found[place] if place < kept else -1
            distances[query, place] = near[place] if place < kept else np.inf


@compiled_part
def _scan(half_norms: np.ndarray, products: np.ndarray, begin: int, end: int, found: np.ndarray, near: np.ndarray) -> int:
    """Keep the rows in [begin, end) with the smallest half_norms - products; return how many there are."""
    kept = min(len(found), end - begin)
    nearness = np.empty(end - begin, products.dtype)
    for row in range(end - begin):
        nearness[row] = products[begin + row] - half_norms[begin + row]
    places = np.empty(kept, np.int32)
    if kept:
        place_largest(nearness, places)
    for place in range(kept):
        found[place] = begin + places[place]
        near[place] = -nearness[places[place]]
    return kept


@compiled_part
def _scan_directly(
    keys: np.ndarray, query: np.ndarray, begin: int, end: int, copy: float, found: np.ndarray, near: np.ndarray
) -> int:
    """Keep the nearest rows in [begin, end) by distances computed directly, the newer first among equals."""
    kept = 0
    for row in range(end - 1, begin - 1, -1):
        distance = _distance(keys[row], query, copy)
        if kept < len(found):
            place = kept
            kept += 1
        elif distance < near[kept - 1]:
            place = kept - 1
        else:
            continue
        while place > 0 and near[place - 1] > distance:
            near[place], found[place] = near[place - 1], found[place - 1]
            place -= 1
        near[place], found[place] = distance, row
    return kept


@compiled_part
def _distance(key: np.ndarray, query: np.ndarray, copy: float) -> float:
    total = squared_distance(key, query)
    return float(total) if total > copy else 0.0


@compiled_part
def squared_distance(key: np.ndarray, query: np.ndarray) -> float:
    """Return the squared distance, in the precision of the key."""
    total = key.dtype.type(0)
    for index in range(len(key)):
        difference = key[index] - query[index]
        total += difference * difference
    return total  # type: ignore[no-any-return]


@compiled_part
def _sort(near: np.ndarray, found: np.ndarray, kept: int) -> None:
    """Sort the candidates by distance, the newer first among equals."""
    for last in range(1, kept):
        distance, row = near[last], found[last]
        place = last
        while place > 0 and (near[place - 1] > distance or (near[place - 1] == distance and found[place - 1] < row)):
            near[place], found[place] = near[place - 1], found[place - 1]
            place -= 1
        near[place], found[place] = distance, row
