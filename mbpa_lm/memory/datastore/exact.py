"""Exact search over keys that lie in a file: block after block, so that memory does not grow with them.

Dimensions: `C` queries, `K` neighbours, `d` hidden size.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.memory.nearest import nearest
from mbpa_lm.memory.nearest_plain import Search

NUMBERS_AT_ONCE = 1 << 24
"""Of keys, or of products of queries and keys, that are in memory at once."""
Keys = tuple[Tensor, Tensor]
"""Keys in single precision, and their squared norms."""


def rows_at_once(hidden_size: int) -> int:
    """Return how many keys are read at once."""
    return max(1, NUMBERS_AT_ONCE // hidden_size)


def with_norms(keys: np.ndarray) -> Keys:
    """Return keys as they are searched."""
    tensor = torch.from_numpy(keys)
    return tensor, tensor.square().sum(1)


def search_blocks(read: Callable[[int, int], Keys], begin: int, end: int, queries_Cd: Tensor, count: int) -> Tensor:
    """Return rows (C, K) of the nearest keys in [begin, end), the newer of equals; -1 where they are fewer.

    Args: read(begin, end) gives consecutive keys.
    """
    best_CK = torch.full((len(queries_Cd), count), torch.inf)
    rows_CK = torch.full((len(queries_Cd), count), -1)
    step = max(1, NUMBERS_AT_ONCE // max(*queries_Cd.shape, 1))
    for first in reversed(range(begin, end, step)):
        keys, squared_norms = read(first, min(first + step, end))
        begins = torch.zeros(len(queries_Cd), dtype=torch.int64)
        places, distances = nearest(Search(keys, squared_norms, queries_Cd, begins, begins + len(keys)), count)
        both = torch.cat([best_CK, distances], dim=1)
        best_CK, kept = both.sort(dim=1, stable=True)
        best_CK, kept = best_CK[:, :count], kept[:, :count]  # of equals, those of later blocks come first
        rows_CK = torch.cat([rows_CK, places + first], dim=1).gather(1, kept)
    return torch.where(best_CK.isinf(), -1, rows_CK)
