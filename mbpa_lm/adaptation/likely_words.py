"""The likeliest words of a distribution, which an entry keeps so that the restricted solver need not ask the whole layer.

Dimensions: `C` positions, `V` vocabulary, `c` words.
"""

from torch import Tensor

from mbpa_lm.largest import largest


def likely_words(log_probabilities_CV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest words (C, c) int32, in any order, and their probabilities (C, c)."""
    if count > log_probabilities_CV.shape[1]:
        raise ValueError(f"{count} likely words of a vocabulary of {log_probabilities_CV.shape[1]}")
    words_Cc, log_probabilities_Cc = largest(log_probabilities_CV, count)
    return words_Cc, log_probabilities_Cc.exp_()
