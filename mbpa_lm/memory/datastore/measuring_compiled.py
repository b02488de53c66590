"""The inner loops of `measuring.py`: keys are read as the bits that lie in the file, widened row by row, and never copied.

Of candidates (C, n), `places` says where in `bits` (N, d) the key of each is; one of -1 is at distance inf. The newer of equals
comes first.
"""

import numpy as np
from numba import prange

from mbpa_lm.memory.nearest_compiled import squared_distance
from mbpa_lm.numerics.compiled import compiled_loop, compiled_part

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2


@compiled_loop
def fill_in_measured(
    bits: np.ndarray,
    number_type: int,
    queries: np.ndarray,
    places: np.ndarray,
    candidates: np.ndarray,
    rows: np.ndarray,
    distances: np.ndarray,
    keys: np.ndarray,
) -> None:
    """Fill `rows` and `distances` (C, K) with the nearest of the candidates, `keys` (C, K, d) with their bits, 0 for none."""
    for query in prange(len(queries)):
        near, order = _measure(bits, number_type, queries[query], places[query], candidates[query])
        for place in range(rows.shape[1]):
            rows[query, place] = candidates[query, order[place]]
            distances[query, place] = near[place]
            if rows[query, place] >= 0:
                keys[query, place] = bits[places[query, order[place]]]
            else:
                keys[query, place] = 0


@compiled_part
def _measure(
    bits: np.ndarray, number_type: int, query: np.ndarray, places: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of all candidates, nearest first, and which candidate each is of."""
    near = np.empty(len(candidates), np.float32)
    order = np.empty(len(candidates), np.int64)
    key = np.empty(len(query), np.float32)
    for candidate in range(len(candidates)):  # rows lie anywhere: ask for all of them before waiting for one
        order[candidate] = bits[places[candidate], 0] + bits[places[candidate], len(query) // 2]
    for candidate in range(len(candidates)):
        row, distance = candidates[candidate], np.float32(np.inf)
        if row >= 0:
            _widen(bits[places[candidate]], number_type, key)
            distance = squared_distance(key, query)
        place = candidate
        while place > 0 and (
            near[place - 1] > distance or (near[place - 1] == distance and candidates[order[place - 1]] < row)
        ):
            near[place], order[place] = near[place - 1], order[place - 1]
            place -= 1
        near[place], order[place] = distance, candidate
    return near, order


@compiled_part
def _widen(bits: np.ndarray, number_type: int, numbers: np.ndarray) -> None:
    """Turn finite numbers of a type into single precision."""
    if number_type == FLOAT16:
        # The exponent's bias is put right by a product, which makes subnormal numbers right as well.
        for index in range(len(numbers)):
            word = np.int32(bits[index])
            magnitude = np.int32((word & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
            numbers[index] = -magnitude if word & 0x8000 else magnitude
    elif number_type == BFLOAT16:
        for index in range(len(numbers)):
            numbers[index] = np.int32(np.int32(bits[index]) << 16).view(np.float32)
    else:
        for index in range(len(numbers)):
            numbers[index] = np.int32(bits[index]).view(np.float32)
