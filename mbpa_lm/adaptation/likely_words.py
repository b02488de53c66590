"""The likeliest words of a distribution, which an entry keeps so that the restricted solver need not ask the whole layer.

Dimensions: `C` positions, `V` vocabulary, `c` words.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mbpa_lm.compiled import can_take, compiled_loop
from mbpa_lm.largest_compiled import place_largest


def likely_words(log_probabilities_CV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest words (C, c) int32, in any order, and their probabilities (C, c)."""
    if count > log_probabilities_CV.shape[1]:
        raise ValueError(f"{count} likely words of a vocabulary of {log_probabilities_CV.shape[1]}")
    if not can_take(log_probabilities_CV):
        likely = log_probabilities_CV.topk(count, sorted=False)
        return likely.indices.int(), likely.values.exp()
    words_Cc = torch.empty(len(log_probabilities_CV), count, dtype=torch.int32)
    chosen_Cc = torch.empty(len(log_probabilities_CV), count, dtype=log_probabilities_CV.dtype)
    if count:
        _largest(log_probabilities_CV.contiguous().numpy(), words_Cc.numpy(), chosen_Cc.numpy())
    return words_Cc, chosen_Cc.exp_()


@compiled_loop
def _largest(numbers: np.ndarray, columns: np.ndarray, chosen: np.ndarray) -> None:
    """Fill in the columns of the largest numbers of each row, and those numbers."""
    for row in prange(len(numbers)):
        place_largest(numbers[row], columns[row])
        for place in range(columns.shape[1]):
            chosen[row, place] = numbers[row, columns[row, place]]
