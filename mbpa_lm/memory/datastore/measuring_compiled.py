"""The inner loop of `measuring.py`."""

import numpy as np
from numba import prange

from mbpa_lm.compiled import compiled_loop
from mbpa_lm.memory.nearest_compiled import squared_distance


@compiled_loop
def fill_in_measured(
    keys: np.ndarray,
    queries: np.ndarray,
    candidates: np.ndarray,
    rows: np.ndarray,
    distances: np.ndarray,
    places: np.ndarray,
) -> None:
    """Fill `rows`, `distances` and `places` (C, K) with the nearest of the candidates (C, n), whose keys are (C, n, d).

    `places` says which of the candidates each is. A candidate of -1 is at distance inf; the newer of equals comes first.
    """
    count = rows.shape[1]
    for query in prange(len(queries)):
        near = np.empty(candidates.shape[1], np.float32)
        order = np.empty(candidates.shape[1], np.int64)
        for candidate in range(candidates.shape[1]):
            row, distance = candidates[query, candidate], np.float32(np.inf)
            if row >= 0:
                distance = squared_distance(keys[query, candidate], queries[query])
            place = candidate
            while place > 0 and (
                near[place - 1] > distance or (near[place - 1] == distance and candidates[query, order[place - 1]] < row)
            ):
                near[place], order[place] = near[place - 1], order[place - 1]
                place -= 1
            near[place], order[place] = distance, candidate
        for place in range(count):
            places[query, place] = order[place]
            distances[query, place] = near[place]
            rows[query, place] = candidates[query, order[place]]
