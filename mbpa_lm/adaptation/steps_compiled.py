"""The inner loop of `steps.py` on a CPU."""

import numpy as np
from numba import prange

from mbpa_lm.numerics.compiled import compiled_loop, exponential


@compiled_loop
def step(
    start: np.ndarray,
    moved: np.ndarray,
    values: np.ndarray,
    kept: np.float32,
    alpha: np.float32,
    frozen_last: bool,
    total: np.ndarray,
) -> None:
    """Set total (B, K, S) to kept * total + alpha * (softmax(start - moved) - onehot(values)), all float32.

    With `frozen_last` the last of the S columns is not moved.
    """
    neighbours, size = start.shape[1], start.shape[2]
    for query in prange(len(start)):
        numbers = np.empty((neighbours, size), np.float32)
        for k in range(neighbours):
            for s in range(size):
                numbers[k, s] = start[query, k, s] - moved[query, k, s]
            if frozen_last:
                numbers[k, size - 1] = start[query, k, size - 1]
            largest = numbers[k, 0]
            for s in range(size):
                largest = max(largest, numbers[k, s])
            for s in range(size):
                numbers[k, s] -= largest
        every = numbers.ravel()
        for place in range(neighbours * size):
            every[place] = exponential(every[place])
        for k in range(neighbours):
            mass = np.float32(0)
            for s in range(size):
                mass += numbers[k, s]
            factor = alpha / mass
            for s in range(size):
                total[query, k, s] = kept * total[query, k, s] + factor * numbers[k, s]
            total[query, k, values[query, k]] -= alpha
