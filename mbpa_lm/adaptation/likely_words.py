"""The likeliest words of a distribution, which an entry keeps so that the restricted solver need not ask the whole layer.

Dimensions: `C` positions, `V` vocabulary, `c` words.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mbpa_lm.adaptation.problem import at_least_single, normalize
from mbpa_lm.numerics.compiled import can_take, compiled_loop, exponential
from mbpa_lm.numerics.largest import largest
from mbpa_lm.numerics.largest_compiled import place_largest

PART = 1024
"""Numbers that are summed in single precision before their sum is added to the others."""


def likely_words(log_probabilities_CV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest words (C, c) int32, in any order, and their probabilities (C, c)."""
    _check_count(count, log_probabilities_CV)
    words_Cc, log_probabilities_Cc = largest(log_probabilities_CV, count)
    return words_Cc, log_probabilities_Cc.exp_()


def likely_words_of_logits(logits_CV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same from logits, and the log-partitions (C,), without the log-probabilities of all words."""
    if logits_CV.dtype != torch.float32 or not can_take(logits_CV):
        log_probabilities_CV, log_partitions_C = normalize(at_least_single(logits_CV))
        return *likely_words(log_probabilities_CV, count), log_partitions_C
    _check_count(count, logits_CV)
    words_Cc = torch.empty(len(logits_CV), count, dtype=torch.int32)
    log_partitions_C = torch.empty(len(logits_CV))
    _fill_in(logits_CV.contiguous().numpy(), words_Cc.numpy(), log_partitions_C.numpy())
    chosen_Cc = logits_CV.gather(1, words_Cc.long())
    return words_Cc, (chosen_Cc - log_partitions_C[:, None]).exp_(), log_partitions_C


def _check_count(count: int, numbers_CV: Tensor) -> None:
    if count > numbers_CV.shape[1]:
        raise ValueError(f"{count} likely words of a vocabulary of {numbers_CV.shape[1]}")


@compiled_loop
def _fill_in(logits: np.ndarray, words: np.ndarray, log_partitions: np.ndarray) -> None:
    """Fill in the places of the largest logits of each row, and log sum exp of the row, summed in double precision."""
    for row in prange(len(logits)):
        place_largest(logits[row], words[row])
        largest_logit = logits[row, 0]
        for place in range(words.shape[1]):
            largest_logit = max(largest_logit, logits[row, words[row, place]])
        mass = np.float64(0)
        for begin in range(0, logits.shape[1], PART):
            part = np.float32(0)
            for place in range(begin, min(begin + PART, logits.shape[1])):
                part += exponential(logits[row, place] - largest_logit)
            mass += np.float64(part)
        log_partitions[row] = largest_logit + np.log(mass)
