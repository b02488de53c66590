"""The inner loop of `cache.py` on a CPU."""

import numpy as np
from numba import prange

from mbpa_lm.numerics.compiled import compiled_loop, exponential


@compiled_loop
def log_shares(
    products: np.ndarray,
    values: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
    targets: np.ndarray,
    found: np.ndarray,
    theta: float,
) -> None:
    """Set found (C,) to the log of the target's share of sum exp(theta * product) over the entries in [begin, end).

    Products are float32. A share below 1e-38 is 0.
    """
    factor = np.float32(theta)
    for query in prange(len(products)):
        begin, end = begins[query], ends[query]
        scores = np.empty(end - begin, np.float32)
        seen = products[query, begin:end]
        words = values[begin:end]
        largest = np.float32(-np.inf)
        for entry in range(len(scores)):
            scores[entry] = factor * seen[entry]
            largest = max(largest, scores[entry])
        for entry in range(len(scores)):
            scores[entry] = exponential(scores[entry] - largest)
        total, share = 0.0, 0.0
        for entry in range(len(scores)):
            total += scores[entry]
            share += scores[entry] * (words[entry] == targets[query])
        found[query] = np.log(share / total) if share > 0 else -np.inf
