"""The likeliest words of a distribution, which an entry keeps so that the restricted solver need not ask the whole layer.

Dimensions: `C` positions, `V` vocabulary, `c` words.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from mbpa_lm.compiled import can_take, compiled_loop, compiled_part

STRIDE = 16
"""Every so manieth number of a row is looked at to guess which are among its largest."""


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
        _largest(log_probabilities_CV.numpy(), words_Cc.numpy(), chosen_Cc.numpy())
    return words_Cc, chosen_Cc.exp_()


@compiled_loop
def _largest(numbers: np.ndarray, columns: np.ndarray, chosen: np.ndarray) -> None:
    """Fill in the columns of the largest numbers of each row, and those numbers.

    A threshold guessed from a sample leaves few candidates; where it leaves too few, the sample's next guess is lower.
    """
    size, count = numbers.shape[1], columns.shape[1]
    for row in prange(len(numbers)):
        candidates = np.empty(size, np.int32)
        rank = 3 * count // (2 * STRIDE) + 2
        found = 0
        while found < count:
            found = 0
            if rank * STRIDE >= size:
                for column in range(size):
                    candidates[column] = column
                found = size
            else:
                threshold = _sampled_threshold(numbers, row, rank)
                for begin in range(0, size, STRIDE):
                    any_above = False
                    for column in range(begin, min(begin + STRIDE, size)):
                        any_above |= numbers[row, column] >= threshold
                    if any_above:
                        for column in range(begin, min(begin + STRIDE, size)):
                            if numbers[row, column] >= threshold:
                                candidates[found] = column
                                found += 1
            rank *= 2
        values = np.empty(found, numbers.dtype)
        for place in range(found):
            values[place] = numbers[row, candidates[place]]
        smallest = np.partition(values, found - count)[found - count]
        taken = 0
        for equal in range(2):  # first those above the smallest, then as many equal to it as there is room for
            for place in range(found):
                if taken < count and (values[place] == smallest if equal else values[place] > smallest):
                    columns[row, taken], chosen[row, taken] = candidates[place], values[place]
                    taken += 1
        for place in range(taken, count):  # only where numbers are NaN
            columns[row, place], chosen[row, place] = candidates[place], values[place]


@compiled_part
def _sampled_threshold(numbers: np.ndarray, row: int, rank: int) -> float:
    """Return the number of the given rank, the largest being 1, among every STRIDE-th number of the row."""
    largest = np.full(rank, -np.inf, numbers.dtype)  # descending
    for column in range(0, numbers.shape[1], STRIDE):
        number = numbers[row, column]
        if number > largest[rank - 1]:
            place = rank - 1
            while place > 0 and largest[place - 1] < number:
                largest[place] = largest[place - 1]
                place -= 1
            largest[place] = number
    return float(largest[rank - 1])
