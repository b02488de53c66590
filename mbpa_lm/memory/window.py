"""The most recent entries of the stream, searched exactly.

Entries lie in one contiguous tensor, so that FAISS searches them where they are: there is no index to keep up to date.
New entries go to the end; when the tensor is full, the window moves to its front, once every `size` entries.

A chunk's queries do not see the same window: query i sees entries up to i - 1 of its own chunk and has lost the i
oldest. So FAISS searches the part that all of them see, the two ends are compared directly under a mask, and the
distances of the candidates are computed again in the keys' own precision before the nearest are chosen. Where more
entries than the spare candidates lie at one distance up to rounding, copies of one context for example, that query is
compared with every entry. That makes the result independent of the chunk length and of the search's rounding.

On CUDA the search is a matrix product and a top-k of PyTorch, in place of FAISS.

Dimensions: `C` positions of a chunk, `K` neighbours, `d` hidden size, `N` entries.
"""

import math

import torch
from torch import Tensor

from mbpa_lm.errors import MbpaError
from mbpa_lm.memory.base import Entries, Neighbours

try:
    import faiss
except ImportError as error:
    raise MbpaError(f"FAISS is not installed ({error}); pip install faiss-cpu, or faiss-gpu-cu12 for CUDA") from None

ROUNDING = 1e-6
"""Rounding of a squared distance that a matrix product in float32 gives, as a share of the squared norms."""

QUERIES_AT_ONCE = 128
SPARE_CANDIDATES = 8
"""Candidates beyond K, so that rounding in the first search cannot lose one of the K nearest."""


class WindowMemory:
    """A sliding window over the last `size` entries."""

    def __init__(self, size: int, hidden_size: int, likely_words: int, dtype: torch.dtype, device: torch.device) -> None:
        self.likely_words = likely_words
        self._size = size
        self._capacity = 2 * size + QUERIES_AT_ONCE
        self._stored = Entries(
            keys=torch.empty(self._capacity, hidden_size, dtype=dtype, device=device),
            values=torch.empty(self._capacity, dtype=torch.int64, device=device),
            log_partitions=torch.empty(self._capacity, dtype=dtype, device=device),
            likely_words=torch.empty(self._capacity, likely_words, dtype=torch.int64, device=device),
            likely_log_probabilities=torch.empty(self._capacity, likely_words, dtype=dtype, device=device),
        )
        self._end = 0  # entries lie in [end - len(self), end) of the tensors
        self._written = 0

    def __len__(self) -> int:
        return min(self._written, self._size)

    def read_and_write(self, entries: Entries, count: int) -> Neighbours:
        """See `Memory.read_and_write`."""
        pieces = zip(*(tensor.split(QUERIES_AT_ONCE) for tensor in entries.tensors()), strict=True)
        parts = [self._read_and_write_some(Entries(*piece), count) for piece in pieces]
        return Neighbours(
            Entries(*(torch.cat(column) for column in zip(*(part.entries.tensors() for part in parts), strict=True))),
            torch.cat([part.squared_distances for part in parts]),
            torch.cat([part.positions for part in parts]),
        )

    def _read_and_write_some(self, entries: Entries, count: int) -> Neighbours:
        queries_Cd = entries.keys
        chunk, before = len(queries_Cd), len(self)
        first = self._append(entries)  # where the chunk's own entries begin
        oldest = first - before
        all_see = max(oldest, min(first, first + chunk - 1 - self._size))  # every query sees [all_see, first)
        seen_by_some = torch.cat([torch.arange(oldest, all_see), torch.arange(first, first + chunk - 1)])
        seen_by_some = seen_by_some.to(queries_Cd.device)
        common = self._search(queries_Cd, all_see, first, count + SPARE_CANDIDATES)
        some = self._search_masked(queries_Cd, seen_by_some, first, count + SPARE_CANDIDATES)
        rows, distances = self._nearest(queries_Cd, torch.cat([common, some], dim=1), count)
        for query in self._doubtful(queries_Cd, distances, (common, some), count):
            own = first + query
            visible = torch.arange(max(oldest, own - self._size), own, device=rows.device)[None]
            rows[query], distances[query] = self._nearest(queries_Cd[query : query + 1], visible, count)
        return self._neighbours(rows, distances)

    def _append(self, entries: Entries) -> int:
        chunk = len(entries.keys)
        if self._end + chunk > self._capacity:
            kept = slice(self._end - len(self), self._end)
            for stored in self._stored.tensors():
                stored[: len(self)] = stored[kept].clone()
            self._end = len(self)
        first, self._end = self._end, self._end + chunk
        for stored, new in zip(self._stored.tensors(), entries.tensors(), strict=True):
            stored[first : self._end] = new
        self._written += chunk
        return first

    def _search(self, queries_Cd: Tensor, begin: int, end: int, count: int) -> Tensor:
        """Return the rows (C, n) of the entries in [begin, end) nearest to each query."""
        count = min(count, end - begin)
        if count == 0:
            return torch.empty(len(queries_Cd), 0, dtype=torch.int64, device=queries_Cd.device)
        keys_Nd = self._stored.keys[begin:end]
        if queries_Cd.device.type == "cpu":
            _, rows = faiss.knn(queries_Cd.float().contiguous().numpy(), keys_Nd.float().contiguous().numpy(), count)
            return begin + torch.from_numpy(rows)
        return begin + _squared_distances(queries_Cd, keys_Nd).topk(count, largest=False).indices

    def _search_masked(self, queries_Cd: Tensor, rows: Tensor, first: int, count: int) -> Tensor:
        """Return the nearest of `rows` (n,) that each query may see, -1 where there is none: (C, min(n, count))."""
        own = first + torch.arange(len(queries_Cd), device=rows.device)[:, None]  # (C, 1): where each query is stored
        hidden = (rows >= own) | (rows < own - self._size)
        distances = _squared_distances(queries_Cd, self._stored.keys[rows]).masked_fill(hidden, math.inf)
        nearest, columns = distances.topk(min(count, len(rows)), largest=False)
        return rows[columns].masked_fill(nearest.isinf(), -1)

    def _nearest(self, queries_Cd: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Choose the nearest `count` of the candidate rows (C, n), by distances computed directly: rows, distances."""
        chunk = len(queries_Cd)
        if rows.shape[1] < count:
            rows = torch.cat([rows, rows.new_full((chunk, count - rows.shape[1]), -1)], dim=1)
        rows = rows.sort(dim=1, descending=True).values  # newer first, kept so among equal distances
        differences = self._stored.keys[rows.clamp(min=0)] - queries_Cd[:, None]
        distances = differences.square_().sum(-1).masked_fill_(rows < 0, math.inf)
        distances, order = distances.sort(dim=1, stable=True)
        return rows.gather(1, order)[:, :count], distances[:, :count]

    def _doubtful(self, queries_Cd: Tensor, distances_CK: Tensor, candidates: tuple[Tensor, ...], count: int) -> list[int]:
        """Return the queries whose K-th distance is, up to rounding, that of the farthest candidate of a full search."""
        doubtful_C = torch.zeros(len(queries_Cd), dtype=torch.bool, device=queries_Cd.device)
        for rows in candidates:
            if rows.shape[1] < count + SPARE_CANDIDATES:  # a search that left nothing out
                continue
            last_Cd = self._stored.keys[rows[:, -1].clamp(min=0)]
            farthest_C = (last_Cd - queries_Cd).square().sum(-1)
            rounding_C = ROUNDING * (last_Cd.square().sum(-1) + queries_Cd.square().sum(-1))
            doubtful_C |= (rows[:, -1] >= 0) & (farthest_C <= distances_CK[:, -1] + rounding_C)
        return doubtful_C.nonzero()[:, 0].tolist()

    def _neighbours(self, rows: Tensor, distances: Tensor) -> Neighbours:
        empty, filled = rows < 0, rows.clamp(min=0)
        positions = filled + (self._written - self._end)
        found = [stored[filled] for stored in self._stored.tensors()]
        for tensor in found:
            tensor[empty] = 0
        return Neighbours(Entries(*found), distances, positions.masked_fill_(empty, -1))


def _squared_distances(queries_Cd: Tensor, keys_Nd: Tensor) -> Tensor:
    """Return (C, N) squared distances through one matrix product; rounding is that of the product."""
    products = queries_Cd @ keys_Nd.T
    return queries_Cd.square().sum(1, keepdim=True) + keys_Nd.square().sum(1) - 2 * products
