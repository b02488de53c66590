"""The most recent entries of the stream, searched exactly.

Entries lie in one contiguous tensor, so that they are searched where they are: there is no index to keep up to date. New
entries go to the end; when the tensor is full, the window moves to its front, once every `size` entries.

A chunk's queries do not see the same window: query i sees entries up to i - 1 of its own chunk and has lost the i oldest. So a
whole chunk is written first, and each query is told which stretch of the tensor it may see.

Dimensions: `C` positions of a chunk, `K` neighbours, `d` hidden size, `N` entries.
"""

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.nearest import nearest

QUERIES_AT_ONCE = 256


class WindowMemory:
    """A sliding window over the last `size` entries.

    Distances are Euclidean, or, with a `metric` (d,) of positive numbers, sum_i metric_i (h_i - q_i)^2.
    """

    def __init__(
        self,
        size: int,
        hidden_size: int,
        likely_words: int,
        dtype: torch.dtype,
        device: torch.device,
        metric: Tensor | None = None,
    ) -> None:
        self.likely_words = likely_words
        self._size = size
        self._capacity = 2 * size + QUERIES_AT_ONCE
        self._stored = Entries(
            keys=torch.empty(self._capacity, hidden_size, dtype=dtype, device=device),
            values=torch.empty(self._capacity, dtype=torch.int64, device=device),
            log_partitions=torch.empty(self._capacity, dtype=torch.promote_types(dtype, torch.float32), device=device),
            likely_words=torch.empty(self._capacity, likely_words, dtype=torch.int32, device=device),
            likely_probabilities=torch.empty(self._capacity, likely_words, dtype=dtype, device=device),
        )
        self._scale_d = None if metric is None else metric.to(device, dtype).sqrt()
        # The keys as they are searched: the same tensor unless a metric stretches it.
        self._searched_Nd = self._stored.keys if metric is None else torch.empty_like(self._stored.keys)
        self._squared_norms_N = torch.empty(self._capacity, dtype=dtype, device=device)
        self._end = 0  # entries lie in [end - len(self), end) of the tensors
        self._written = 0

    def __len__(self) -> int:
        return min(self._written, self._size)

    def takes_products(self, size: int) -> bool:
        """See `Memory.takes_products`."""
        return self._scale_d is None and size == self._size

    def read_and_write(self, entries: Entries, count: int, products: Tensor | None = None) -> Neighbours:
        """See `Memory.read_and_write`."""
        chunk, parts = len(entries.keys), []
        for begin in range(0, chunk, QUERIES_AT_ONCE):
            rows = slice(begin, min(begin + QUERIES_AT_ONCE, chunk))
            piece = Entries(*(tensor[rows] for tensor in entries.tensors()))
            own = None if products is None else products[rows, : products.shape[1] - (chunk - rows.stop)]
            parts.append(self._read_and_write_some(piece, count, own))
        return Neighbours.joined(parts)

    def _read_and_write_some(self, entries: Entries, count: int, products: Tensor | None) -> Neighbours:
        """Answer and store; the last column of the products, if there are any, is the last of these entries."""
        before = len(self)
        first = self._append(entries)  # where the chunk's own entries begin
        oldest = first - before
        ends_C = torch.arange(first, self._end, device=entries.keys.device)
        begins_C = (ends_C - self._size).clamp(min=oldest)
        rows_CK, distances_CK = nearest(
            self._searched_Nd[oldest : self._end],
            self._squared_norms_N[oldest : self._end],
            self._searched_Nd[first : self._end],
            begins_C - oldest,
            ends_C - oldest,
            count,
            None if products is None else products[:, products.shape[1] - (self._end - oldest) :].contiguous(),
        )
        empty_CK = rows_CK < 0
        rows_CK = rows_CK + oldest
        positions_CK = (rows_CK + (self._written - self._end)).masked_fill_(empty_CK, -1)
        return Neighbours(self._entries_at(rows_CK, empty_CK), distances_CK, positions_CK)

    def _append(self, entries: Entries) -> int:
        chunk = len(entries.keys)
        if self._end + chunk > self._capacity:
            kept = slice(self._end - len(self), self._end)
            for stored in {id(tensor): tensor for tensor in self._all_tensors()}.values():
                stored[: len(self)] = stored[kept].clone()
            self._end = len(self)
        first, self._end = self._end, self._end + chunk
        for stored, new in zip(self._stored.tensors(), entries.tensors(), strict=True):
            stored[first : self._end] = new
        if self._scale_d is not None:
            self._searched_Nd[first : self._end] = entries.keys * self._scale_d
        self._squared_norms_N[first : self._end] = self._searched_Nd[first : self._end].square().sum(1)
        self._written += chunk
        return first

    def _all_tensors(self) -> tuple[Tensor, ...]:
        return (*self._stored.tensors(), self._searched_Nd, self._squared_norms_N)

    def _entries_at(self, rows_CK: Tensor, empty_CK: Tensor) -> Entries:
        filled = rows_CK.clamp(min=0).flatten()
        found = [stored.index_select(0, filled).view(*rows_CK.shape, *stored.shape[1:]) for stored in self._stored.tensors()]
        if bool(empty_CK.any()):
            for tensor in found:
                tensor[empty_CK] = 0
        return Entries(*found)
