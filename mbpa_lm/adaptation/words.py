"""Lists of words that overlap, one a neighbour, merged into one list a query: sums over equal words without a (B, V) tensor.

Slots are sorted by word, so equal words form a run, and a run's sum is a difference of two running sums. The last slot of a
run stands for its word. Dimensions: `B` queries, `n` slots, `S` chosen words.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MergedWords:
    """Sorted slots of every query."""

    words_Bn: Tensor  # int64, ascending
    last_Bn: Tensor  # bool: whether the slot is the last of its word
    always_Bn: Tensor  # bool: at a last slot, whether its word is among those always chosen
    _order_Bn: Tensor  # the slot that stands here, among those given
    _before_Bn: Tensor  # at each slot, how many slots lie before its word's run
    _listed: int

    def sum_by_word(self, numbers_Bm: Tensor) -> Tensor:
        """Sum numbers that belong to the listed slots (B, m) over equal words: (B, n), at last slots, 0 elsewhere."""
        padded = torch.nn.functional.pad(numbers_Bm, (0, self._order_Bn.shape[1] - self._listed))
        # Running sums in float64: a difference of two of them keeps the precision of a small sum behind large ones.
        running = torch.nn.functional.pad(padded.gather(1, self._order_Bn).cumsum(1, dtype=torch.float64), (1, 0))
        sums = running[:, 1:] - running.gather(1, self._before_Bn)
        return (sums * self.last_Bn).to(numbers_Bm.dtype)

    def largest(self, scores_Bn: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Choose `count` words, those of `always_Bn` first: words (B, S), and their slots (B, S), -1 for an empty place."""
        scores = torch.where(self.always_Bn, torch.inf, scores_Bn).masked_fill(~self.last_Bn, -1.0)
        chosen = scores.topk(min(count, scores.shape[1]), dim=1, sorted=False)
        words_BS = self.words_Bn.gather(1, chosen.indices)
        return words_BS, chosen.indices.masked_fill(chosen.values < 0, -1)

    def put(self, numbers_Bn: Tensor, places_BS: Tensor, values_BS: Tensor) -> Tensor:
        """Return `numbers` with `values` at the given slots."""
        spare = torch.nn.functional.pad(numbers_Bn, (0, 1))  # one more slot, for empty places
        places = places_BS.masked_fill(places_BS < 0, numbers_Bn.shape[1])
        return spare.scatter(1, places, values_BS)[:, :-1]


def merge_words(listed_Bm: Tensor, always_BK: Tensor) -> MergedWords:
    """Merge the words (B, m) that carry numbers with those (B, K) that are always chosen."""
    given = torch.cat([listed_Bm, always_BK], dim=1)
    n = given.shape[1]
    bits = max(n - 1, 1).bit_length()
    slots = torch.arange(n, device=given.device)
    packed = _sorted((given << bits) | slots)
    words, order = packed >> bits, packed & ((1 << bits) - 1)
    changes = words[:, 1:] != words[:, :-1]
    last = torch.nn.functional.pad(changes, (0, 1), value=True)
    first = torch.nn.functional.pad(changes, (1, 0), value=True)
    before = torch.where(first, slots, 0).cummax(1).values
    marked = torch.nn.functional.pad((order >= listed_Bm.shape[1]).cumsum(1), (1, 0))
    always = last & (marked[:, 1:] > marked.gather(1, before))
    return MergedWords(words, last, always, order, before, listed_Bm.shape[1])


def _sorted(numbers_Bn: Tensor) -> Tensor:
    """Sort each row; NumPy's vectorized sort is several times PyTorch's on a CPU."""
    if numbers_Bn.device.type == "cpu":
        return torch.from_numpy(np.sort(numbers_Bn.numpy(), axis=1))
    return numbers_Bn.sort(dim=1).values
