"""The inner loop of `measuring.py`: keys are read as the bits that lie in the file, widened row by row, and never copied."""

import numpy as np
from numba import prange

from mbpa_lm.compiled import compiled_loop, compiled_part
from mbpa_lm.memory.nearest_compiled import squared_distance

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
    kept: np.ndarray,
) -> None:
    """Fill `rows`, `distances` and `kept` (C, K) with the nearest of the candidates (C, n), the newer first among equals.

    `places` (C, n) says where in `bits` (N, d) the key of a candidate is, `kept` which of the candidates was taken. One of -1
    is at distance inf.
    """
    count = rows.shape[1]
    for query in prange(len(queries)):
        near = np.empty(candidates.shape[1], np.float32)
        order = np.empty(candidates.shape[1], np.int64)
        key = np.empty(queries.shape[1], np.float32)
        for candidate in range(candidates.shape[1]):
            row, distance = candidates[query, candidate], np.float32(np.inf)
            if row >= 0:
                _widen(bits[places[query, candidate]], number_type, key)
                distance = squared_distance(key, queries[query])
            place = candidate
            while place > 0 and (
                near[place - 1] > distance or (near[place - 1] == distance and candidates[query, order[place - 1]] < row)
            ):
                near[place], order[place] = near[place - 1], order[place - 1]
                place -= 1
            near[place], order[place] = distance, candidate
        for place in range(count):
            kept[query, place] = order[place]
            distances[query, place] = near[place]
            rows[query, place] = candidates[query, order[place]]


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
