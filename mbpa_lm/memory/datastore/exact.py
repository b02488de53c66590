"""Exact search over keys that lie in a file: block after block, so that memory does not grow with them.

Dimensions: `C` queries, `K` neighbours, `d` hidden size.
"""

from collections.abc import Callable

import faiss
import numpy as np

BLOCK = 1 << 15


def search_blocks(
    keys: Callable[[int, int], np.ndarray], begin: int, end: int, queries_Cd: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return squared distances (C, K) and rows (C, K) of the nearest keys in [begin, end), the newer of equals.

    Where they are fewer, inf and -1. Args: keys(begin, end) reads consecutive keys in single precision. Distances are up to the
    rounding of a matrix product.
    """
    best_CK = np.full((len(queries_Cd), count), np.inf, dtype=np.float32)
    rows_CK = np.full((len(queries_Cd), count), -1, dtype=np.int64)
    for first in reversed(range(begin, end, BLOCK)):
        block = np.ascontiguousarray(keys(first, min(first + BLOCK, end))[::-1])  # of equals, FAISS keeps those that come first
        distances, places = faiss.knn(queries_Cd, block, min(count, len(block)))
        both = np.concatenate([best_CK, distances], axis=1)
        kept = np.argsort(both, axis=1, kind="stable")[:, :count]
        places = first + len(block) - 1 - places
        rows_CK = np.take_along_axis(np.concatenate([rows_CK, places], axis=1), kept, axis=1)
        best_CK = np.take_along_axis(both, kept, axis=1)
    return best_CK, rows_CK
