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
    """Return squared distances (C, K) and rows (C, K) of the nearest keys in [begin, end), in no order; inf and -1 if fewer.

    Args: keys(begin, end) reads consecutive keys in single precision. Distances are up to the rounding of a matrix product.
    """
    best_CK = np.full((len(queries_Cd), count), np.inf, dtype=np.float32)
    rows_CK = np.full((len(queries_Cd), count), -1, dtype=np.int64)
    for first in range(begin, end, BLOCK):
        block = keys(first, min(first + BLOCK, end))
        distances, places = faiss.knn(queries_Cd, block, min(count, len(block)))
        both = np.concatenate([best_CK, distances], axis=1)
        kept = np.argpartition(both, count - 1, axis=1)[:, :count]
        rows_CK = np.take_along_axis(np.concatenate([rows_CK, places + first], axis=1), kept, axis=1)
        best_CK = np.take_along_axis(both, kept, axis=1)
    return best_CK, rows_CK
