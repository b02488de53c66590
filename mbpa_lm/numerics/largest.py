"""The largest numbers of each row of a matrix.

Dimensions: `C` rows of `V` numbers, `c` of them chosen.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mbpa_lm.numerics.compiled import can_take, compiled_loop
from mbpa_lm.numerics.largest_compiled import place_largest


def largest(numbers_CV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the columns (C, c) int32 of the largest numbers of each row, in any order, and those numbers (C, c)."""
    if not can_take(numbers_CV):
        chosen = numbers_CV.topk(count, sorted=False)
        return chosen.indices.int(), chosen.values
    columns_Cc = torch.empty(len(numbers_CV), count, dtype=torch.int32)
    chosen_Cc = torch.empty(len(numbers_CV), count, dtype=numbers_CV.dtype)
    if count:
        _largest(numbers_CV.contiguous().numpy(), columns_Cc.numpy(), chosen_Cc.numpy())
    return columns_Cc, chosen_Cc


@compiled_loop
def _largest(numbers: np.ndarray, columns: np.ndarray, chosen: np.ndarray) -> None:
    """Fill in the columns of the largest numbers of each row, and those numbers."""
    for row in prange(len(numbers)):
        place_largest(numbers[row], columns[row])
        for place in range(columns.shape[1]):
            chosen[row, place] = numbers[row, columns[row, place]]
