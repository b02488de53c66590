"""Several memories as one: a training set, documents and the stream so far, searched together, the nearest of all kept.

Entries count as written in the order in which the memories are named, those of the stream last.

Dimensions: `C` positions of a chunk, `K` neighbours, `d` hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries, EntryStore, Memory, Neighbours, SearchesAhead, nearest_of, nearest_of_two

REFINED = 4


class JoinedStores:
    """Stores that are searched as one; where they keep different numbers of likely words, none are given."""

    def __init__(self, stores: Sequence[EntryStore]) -> None:
        self._stores = stores
        kept = {store.likely_words for store in stores}
        self.likely_words = kept.pop() if len(kept) == 1 else 0

    def __len__(self) -> int:
        return sum(len(store) for store in self._stores)

    def search(self, queries_Cd: Tensor, count: int) -> Neighbours:
        """See `EntryStore.search`."""
        found, before = [], 0
        for store in self._stores:
            each = store.search(queries_Cd, count).later(before)
            found.append(each if self.likely_words else each.without_likely_words())
            before += len(store)
        return found[0] if len(found) == 1 else nearest_of(_of_one_type(found), count)


def _of_one_type(found: Sequence[Neighbours]) -> list[Neighbours]:
    """Return neighbours with keys of a type that holds those of all."""
    key_type = reduce(torch.promote_types, (each.entries.keys.dtype for each in found))
    return [replace(each, entries=replace(each.entries, keys=each.entries.keys.to(key_type))) for each in found]


class CompositeMemory:
    """The stream's own memory, and stores that were there before."""

    def __init__(self, stream: Memory, store: EntryStore, metric: Tensor | None = None) -> None:
        """Args: metric (d,), that the stream's memory measures with; among REFINED times as many of the store's entries as are
        wanted, nearest without it, the nearest are then taken with it. Raises ValueError where the two keep different numbers
        of likely words.
        """
        if stream.likely_words != store.likely_words:
            raise ValueError("entries with different numbers of likely words")
        self.likely_words, self.surprise = stream.likely_words, stream.surprise
        self._stream, self._store, self._metric_d = stream, store, metric

    def __len__(self) -> int:
        return len(self._store) + len(self._stream)

    def begin(self, keys_Cd: Tensor, count: int) -> None:
        """See `SearchesAhead.begin`."""
        if isinstance(self._stream, SearchesAhead):
            self._stream.begin(keys_Cd, count)

    def takes_products(self, size: int) -> bool:
        """See `Memory.takes_products`."""
        return self._stream.takes_products(size)

    def read_and_write(
        self, entries: Entries, count: int, products: Tensor | None = None, stored: Tensor | None = None
    ) -> Neighbours:
        """See `Memory.read_and_write`."""
        known = self._known(entries.keys, count)
        if stored is not None and not len(self._stream) and not bool(stored.any()):
            types = (tensor.dtype for tensor in entries.tensors())
            return replace(known, entries=Entries(*(map(torch.Tensor.to, known.entries.tensors(), types))))
        recent = self._stream.read_and_write(entries, count, products, stored)
        return nearest_of_two(known, recent.later(len(self._store)), count)

    def _known(self, queries_Cd: Tensor, count: int) -> Neighbours:
        if self._metric_d is None:
            return self._store.search(queries_Cd, count)
        found = self._store.search(queries_Cd, REFINED * count)
        differences = found.entries.keys.to(queries_Cd) - queries_Cd[:, None]
        measured = differences.square() @ self._metric_d.to(queries_Cd)
        empty = torch.full_like(measured, torch.inf)
        return nearest_of([replace(found, squared_distances=measured.where(found.positions >= 0, empty))], count)
