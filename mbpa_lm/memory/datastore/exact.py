"""Exact search over keys that lie in a file: block after block, so that memory does not grow with them.

Dimensions: `C` queries, `K` neighbours, `d` hidden size.
"""

from collections.abc import Callable

import faiss
import numpy as np

NUMBERS_AT_ONCE = 1 << 24
"""Of keys that are in memory at once."""


def rows_at_once(hidden_size: int) -> int:
    """Return how many keys are read at once."""
    return max(1, NUMBERS_AT_ONCE // hidden_size)


def search_blocks(
    keys: Callable[[int, int], np.ndarray], begin: int, end: int, queries_Cd: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return squared distances (C, K) and rows (C, K) of the nearest keys in [begin, end), the newer of equals.

    Where they are fewer, inf and -1. Args: keys(begin, end) reads consecutive keys in single precision. Distances are up to the
    rounding of a matrix product.
    """
    best_CK = np.full((len(queries_Cd), count), np.inf, dtype=np.float32)
    rows_CK = np.full((len(queries_Cd), count), -1, dtype=np.int64)
    step = rows_at_once(queries_Cd.shape[1])
    for first in reversed(range(begin, end, step)):
        block = np.ascontiguousarray(keys(first, min(first + step, end))[::-1])  # of equals, FAISS keeps those that come first
        distances, places = faiss.knn(queries_Cd, block, min(count, len(block)))
        both = np.concatenate([best_CK, distances], axis=1)
        kept = np.argsort(both, axis=1, kind="stable")[:, :count]
        places = first + len(block) - 1 - places
        rows_CK = np.take_along_axis(np.concatenate([rows_CK, places], axis=1), kept, axis=1)
        best_CK = np.take_along_axis(both, kept, axis=1)
    return best_CK, rows_CK
