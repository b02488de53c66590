"""Lists of words that overlap, one a neighbour, merged into one list a query: sums over equal words without a (B, V) tensor.

On a CPU by a hash table in compiled loops, elsewhere by sorting.

Dimensions: `B` queries, `K` neighbours, `c` words listed by a neighbour, `A` words always chosen, `n` places for different
words, `S` chosen words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mbpa_lm.adaptation import words_compiled
from mbpa_lm.numerics.compiled import can_take


@dataclass(frozen=True)
class MergedWords:
    """Every word of a query once."""

    words_Bn: Tensor  # int64, in any order; 0 in places that are not filled
    counts_B: Tensor  # int64, how many words there are; they stand in the first places
    filled_Bn: Tensor  # bool: whether there is a word at the place
    always_Bn: Tensor  # bool: whether it is among those always chosen
    listed_places_BKc: Tensor  # the place of each listed word
    always_places_BA: Tensor  # int64, the place of each word that is always chosen

    def sum_by_word(self, factors_BK: Tensor, numbers_BKc: Tensor) -> Tensor:
        """Sum factor times number over the listed slots of each word: (B, n)."""
        if can_take(numbers_BKc):
            sums_Bn = torch.empty(self.words_Bn.shape, dtype=numbers_BKc.dtype)
            arrays = (self.listed_places_BKc, factors_BK, numbers_BKc, sums_Bn)
            words_compiled.sum_by_place(*(tensor.contiguous().numpy() for tensor in arrays))
            return sums_Bn
        products_Bm = (factors_BK[..., None] * numbers_BKc).flatten(1)
        zeros_Bn = products_Bm.new_zeros(self.words_Bn.shape)
        return zeros_Bn.scatter_add(1, self.listed_places_BKc.flatten(1).long(), products_Bm)

    def masses(self, log_probabilities_BV: Tensor, shifts_Bn: Tensor) -> tuple[Tensor, Tensor]:
        """Return the words' mass under the distributions (B,), and the log of what their shifts make of it (B,)."""
        if can_take(log_probabilities_BV) and log_probabilities_BV.dtype == shifts_Bn.dtype == torch.float32:
            mass_B, log_shifted_B = torch.empty(2, len(shifts_Bn), dtype=log_probabilities_BV.dtype)
            tensors = (log_probabilities_BV, self.words_Bn, self.counts_B, shifts_Bn, mass_B, log_shifted_B)
            words_compiled.masses(*(tensor.numpy() for tensor in tensors))
            return mass_B, log_shifted_B
        base_Bn = log_probabilities_BV.gather(1, self.words_Bn).masked_fill_(~self.filled_Bn, -torch.inf)
        return base_Bn.exp().sum(1), (base_Bn + shifts_Bn).logsumexp(1)

    def number_of(self, words_B: Tensor, numbers_Bn: Tensor) -> Tensor:
        """Return the number at the place of one word a query (B,), 0 where it has no place."""
        if can_take(numbers_Bn):
            found_B = numbers_Bn.new_empty(len(numbers_Bn))
            tensors = (words_B, self.words_Bn, self.counts_B, numbers_Bn, found_B)
            words_compiled.number_of(*(tensor.numpy() for tensor in tensors))
            return found_B
        return (numbers_Bn * (self.filled_Bn & (self.words_Bn == words_B[:, None]))).sum(1)

    def largest(self, scores_Bn: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Choose `count` words, those that are always chosen first: their places (B, S), and which of them are filled."""
        scores_Bn = scores_Bn.masked_fill(self.always_Bn, torch.inf).masked_fill(~self.filled_Bn, -1.0)
        # In the order of their places, and always as many, or sums over them would be rounded otherwise beside other queries.
        places_BS = scores_Bn.topk(min(count, scores_Bn.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values
        return places_BS, scores_Bn.gather(1, places_BS) >= 0


def merge_words(listed_BKc: Tensor, always_BA: Tensor, least_places: int = 1) -> MergedWords:
    """Merge the words (B, K, c) that carry numbers with those (B, A) that are always chosen.

    There are at least so many places, or as many as words are given, even where no query has as many different ones.
    """
    if can_take(listed_BKc):
        return _merge_by_hashing(listed_BKc, always_BA, least_places)
    return merge_by_sorting(listed_BKc, always_BA, least_places)


def merge_by_sorting(listed_BKc: Tensor, always_BA: Tensor, least_places: int = 1) -> MergedWords:
    """Do what `merge_words` does in PyTorch, on any device."""
    given_Bm = torch.cat([always_BA, listed_BKc.flatten(1).long()], dim=1)
    sorted_Bm, order_Bm = given_Bm.sort(dim=1)
    starts_Bm = torch.nn.functional.pad(sorted_Bm[:, 1:] != sorted_Bm[:, :-1], (1, 0), value=True)
    sorted_places_Bm = starts_Bm.cumsum(1) - 1
    places_Bm = torch.empty_like(given_Bm).scatter_(1, order_Bm, sorted_places_Bm)
    counts_B1 = sorted_places_Bm[:, -1:] + 1
    n = max(int(counts_B1.max()), min(least_places, given_Bm.shape[1]))
    words_Bn = torch.zeros(len(given_Bm), n, dtype=torch.int64, device=given_Bm.device).scatter_(1, places_Bm, given_Bm)
    filled_Bn = torch.arange(n, device=given_Bm.device) < counts_B1
    always_places_BA = places_Bm[:, : always_BA.shape[1]]
    always_Bn = torch.zeros_like(filled_Bn).scatter_(1, always_places_BA, True)
    listed_places_BKc = places_Bm[:, always_BA.shape[1] :].reshape(listed_BKc.shape)
    return MergedWords(words_Bn, counts_B1[:, 0], filled_Bn, always_Bn, listed_places_BKc, always_places_BA)


def _merge_by_hashing(listed_BKc: Tensor, always_BA: Tensor, least_places: int) -> MergedWords:
    B, K, c = listed_BKc.shape
    words_Bn = torch.zeros(B, K * c + always_BA.shape[1], dtype=torch.int64)
    listed_places_BKc = torch.empty(B, K, c, dtype=torch.int32)
    always_places_BA = torch.empty_like(always_BA)
    counts_B2 = torch.empty(B, 2, dtype=torch.int64)  # of the words always chosen, which come first, and of all
    arrays = (listed_BKc.contiguous(), always_BA.contiguous(), words_Bn, listed_places_BKc, always_places_BA, counts_B2)
    words_compiled.merge_by_hashing(*(tensor.numpy() for tensor in arrays))
    n = max(int(counts_B2[:, 1].max()), min(least_places, words_Bn.shape[1]))
    places_n = torch.arange(n)
    always_Bn, filled_Bn = (places_n < counts_B2[:, which, None] for which in (0, 1))
    return MergedWords(words_Bn[:, :n], counts_B2[:, 1].contiguous(), filled_Bn, always_Bn, listed_places_BKc, always_places_BA)
