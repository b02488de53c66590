"""The stream's own memory in a Milvus collection: everything that was read is kept, on the server, and after a restart too.

What was written before a chunk is searched on the server, which can be begun as soon as the chunk's hidden states are known;
the chunk's own earlier positions are searched here.

    memory.begin(hidden_states, 32)       # a thread searches,
    ...                                   # the model meanwhile reads the next chunk,
    memory.read_and_write(entries, 32)    # whose keys are those hidden states

Dimensions: `C` positions of a chunk, `K` neighbours, `d` hidden size.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries, Neighbours, nearest_of
from mbpa_lm.memory.composite import REFINED
from mbpa_lm.memory.remote.rows import as_stored
from mbpa_lm.memory.remote.store import RemoteStore, search_entries

QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Begun:
    """A search that was begun, among the entries that there were then."""

    keys_Cd: Tensor
    count: int
    entries: int
    found: Future[Neighbours]

    def answers(self, keys_Cd: Tensor, count: int, entries: int) -> bool:
        """Say whether this is the search for these keys, and nothing was written since."""
        known = (self.count, self.entries, self.keys_Cd.dtype, self.keys_Cd.device)
        return (count, entries, keys_Cd.dtype, keys_Cd.device) == known and torch.equal(keys_Cd, self.keys_Cd)


class RemoteMemory:
    """All entries of the stream, searched as exactly as the collection's index does; none is given up."""

    def __init__(self, store: RemoteStore, surprise: float = 0.0, metric: Tensor | None = None) -> None:
        """Args: store, which the caller closes after the memory; what it holds already was written before the stream; surprise:
        see `Memory.surprise`; metric (d,): among REFINED times as many entries as are wanted, nearest without it, the nearest
        are then taken with it.
        """
        self.likely_words = store.likely_words
        self.surprise = surprise
        self._store, self._metric_d = store, metric
        self._refined = 1 if metric is None else REFINED
        self._begun: Begun | None = None
        self._thread = ThreadPoolExecutor(1, "mbpa-remote-search")

    def __len__(self) -> int:
        return len(self._store)

    def __enter__(self) -> "RemoteMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for a search that was begun, and end its thread."""
        self._thread.shutdown()

    def takes_products(self, size: int) -> bool:
        """See `Memory.takes_products`."""
        return False

    def begin(self, keys_Cd: Tensor, count: int) -> None:
        """See `SearchesAhead.begin`; `read_and_write` takes what it finds where keys and count are the same.

        The chunk before must have been written: where anything is written in between, `read_and_write` searches again. A search
        that was begun before and not taken is given up.
        """
        keys_Cd, count = keys_Cd.detach().clone(), self._refined * count
        self._begun = Begun(keys_Cd, count, len(self._store), self._thread.submit(self._store.search, keys_Cd, count))

    def read_and_write(
        self, entries: Entries, count: int, products: Tensor | None = None, stored: Tensor | None = None
    ) -> Neighbours:
        """See `Memory.read_and_write`; raises DatastoreError where the server stays away, or entries could not be written."""
        keys_Cd, candidates = entries.keys.detach(), self._refined * count
        stored_C = torch.ones_like(entries.values, dtype=torch.bool) if stored is None else stored
        new, before = entries.rows(stored_C), len(self._store)
        known = self._known(keys_Cd, candidates)
        own = self._own(new, keys_Cd, stored_C.cumsum(0) - stored_C.long(), candidates).later(before)
        self._store.add(new)
        return self._measured(nearest_of([known, own.on(keys_Cd.device)], candidates), keys_Cd, count)

    def _known(self, keys_Cd: Tensor, count: int) -> Neighbours:
        begun, self._begun = self._begun, None
        if begun is not None and begun.answers(keys_Cd, count, len(self._store)):
            return begun.found.result()
        return self._store.search(keys_Cd, count)

    def _own(self, entries: Entries, queries_Cd: Tensor, ends_C: Tensor, count: int) -> Neighbours:
        """Return the nearest of the chunk's own earlier entries, as they will lie in the store."""
        stored, parts = as_stored(entries, self._store.layout), []
        queries, ends = queries_Cd.to("cpu", torch.float32), ends_C.cpu()
        for some, some_ends in zip(queries.split(QUERIES_AT_ONCE), ends.split(QUERIES_AT_ONCE), strict=True):
            parts.append(search_entries(stored.rows(slice(0, int(some_ends[-1]))), some, some_ends, count))
        return Neighbours.joined(parts)

    def _measured(self, found: Neighbours, queries_Cd: Tensor, count: int) -> Neighbours:
        """Return the nearest of what was found as the metric measures, where there is one."""
        if self._metric_d is None:
            return found
        differences = found.entries.keys.to(queries_Cd) - queries_Cd[:, None]
        measured = (differences.square() @ self._metric_d.to(queries_Cd)).to(found.squared_distances)
        empty = torch.full_like(measured, torch.inf)
        return nearest_of([replace(found, squared_distances=measured.where(found.positions >= 0, empty))], count)
