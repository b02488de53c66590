"""The most recent entries of the stream, searched exactly.

Entries lie in one contiguous tensor, so that they are searched where they are: there is no index to keep up to date. New
entries go to the end; when the tensor is full, the window moves to its front, once every `size` entries.

A chunk's queries do not see the same window: query i sees what was stored up to position i - 1 of its own chunk and has lost
as many of the oldest. So a whole chunk is written first, and each query is told which stretch of the tensor it may see.

Dimensions: `C` positions of a chunk, `K` neighbours, `d` hidden size, `N` entries.
"""

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.entry_tensors import EntryTensors
from mbpa_lm.memory.nearest import nearest
from mbpa_lm.memory.nearest_plain import Search

QUERIES_AT_ONCE = 256


class WindowMemory:
    """A sliding window over the last `size` entries; see EntryTensors for `metric`, and `Memory.surprise`."""

    def __init__(
        self,
        size: int,
        hidden_size: int,
        likely_words: int,
        dtype: torch.dtype,
        device: torch.device,
        metric: Tensor | None = None,
        surprise: float = 0.0,
    ) -> None:
        self.likely_words = likely_words
        self.surprise = surprise
        self._size = size
        self._tensors = EntryTensors(2 * size + QUERIES_AT_ONCE, hidden_size, likely_words, dtype, device, metric)
        self._takes_products = metric is None and surprise <= 0
        self._end = 0  # entries lie in [end - len(self), end) of the tensors
        self._written = 0

    def __len__(self) -> int:
        return min(self._written, self._size)

    def entries(self) -> Entries:
        """Return a copy of all entries, oldest first."""
        rows = torch.arange(self._end - len(self), self._end, device=self._tensors.searched_Nd.device)[None]
        return self._tensors.at(rows, torch.zeros_like(rows, dtype=torch.bool)).rows(torch.tensor(0))

    def takes_products(self, size: int) -> bool:
        """See `Memory.takes_products`."""
        return self._takes_products and size == self._size

    def read_and_write(
        self, entries: Entries, count: int, products: Tensor | None = None, stored: Tensor | None = None
    ) -> Neighbours:
        """See `Memory.read_and_write`."""
        chunk, parts = len(entries.keys), []
        stored_C = torch.ones_like(entries.values, dtype=torch.bool) if stored is None else stored
        for begin in range(0, chunk, QUERIES_AT_ONCE):
            rows = slice(begin, min(begin + QUERIES_AT_ONCE, chunk))
            own = None if products is None else products[rows, : products.shape[1] - (chunk - rows.stop)]
            parts.append(self._read_and_write_some(entries.rows(rows), stored_C[rows], count, own))
        return Neighbours.joined(parts)

    def _read_and_write_some(self, entries: Entries, stored_C: Tensor, count: int, products: Tensor | None) -> Neighbours:
        """Answer and store; the last column of the products, if there are any, is the last of these entries."""
        before = len(self)
        first = self.write(entries if bool(stored_C.all()) else entries.rows(stored_C))  # where the chunk's own begin
        oldest = first - before
        ends_C = first + stored_C.cumsum(0) - stored_C.long()
        begins_C = (ends_C - self._size).clamp(min=oldest)
        search = Search(
            self._tensors.searched_Nd[oldest : self._end],
            self._tensors.squared_norms_N[oldest : self._end],
            self._tensors.scaled(entries.keys),
            begins_C - oldest,
            ends_C - oldest,
        )
        if products is not None:
            products = products[:, products.shape[1] - (self._end - oldest) :].contiguous()
        rows_CK, distances_CK = nearest(search, count, products)
        empty_CK = rows_CK < 0
        rows_CK = rows_CK + oldest
        positions_CK = (rows_CK + (self._written - self._end)).masked_fill_(empty_CK, -1)
        return Neighbours(self._tensors.at(rows_CK, empty_CK), distances_CK, positions_CK)

    def write(self, entries: Entries) -> int:
        """Store entries without asking anything; return where in the tensors they begin."""
        chunk = len(entries.keys)
        if self._end + chunk > self._tensors.capacity:
            self._tensors.move_to_front(slice(self._end - len(self), self._end))
            self._end = len(self)
        first, self._end = self._end, self._end + chunk
        self._tensors.write(slice(first, self._end), entries)
        self._written += chunk
        return first
