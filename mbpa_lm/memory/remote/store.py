"""The store itself: opened or made, added to, and searched.

    with RemoteStore(RemoteSettings("runs/ptb/memory.db"), identity, Layout(400)) as store:
        store.add(entries)
        neighbours = store.search(hidden_states, 32)

The server's distances choose the candidates, some more than are wanted; they are measured again here, from the keys that come
back with them. Where all of the spare ones lie as far away as the last that is wanted, copies of one context for example, more
are asked for, so that the newest of equals is found.

One process may write at a time; others see what there was when they opened it, and of Milvus Lite only one may have the file
open. A store that nobody closes is closed when the process ends.

Dimensions: `C` queries, `K` neighbours, `n` candidates, `d` hidden size.
"""

import functools
import logging
import threading

import torch
from torch import Tensor
from torch.nn.functional import pad

from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.base import Entries, Neighbours, nearest_of
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.measuring import nearest_candidates
from mbpa_lm.memory.nearest import nearest
from mbpa_lm.memory.nearest_plain import SPARE_CANDIDATES, Search
from mbpa_lm.memory.remote.collection import MOST_CANDIDATES, Collection
from mbpa_lm.memory.remote.connection import Connection
from mbpa_lm.memory.remote.rows import as_stored, joined, no_entries
from mbpa_lm.memory.remote.settings import RemoteSettings
from mbpa_lm.memory.remote.writer import Writer

MORE_CANDIDATES = 8
"""How many times as many candidates are asked for where those that came do not decide."""
ROUNDING = 1e-5
"""Distances of the server that differ by a smaller share may be in the wrong order."""


class RemoteStore:
    """Entries in a Milvus collection, and those on their way there, searched as one."""

    def __init__(self, settings: RemoteSettings, identity: Identity, layout: Layout) -> None:
        """Open the collection, or make it.

        Args: identity of the model that will search it, which must be the one that wrote it; layout of the entries. Raises
        ConfigError for impossible settings, DatastoreError where the server stays away or refuses, or where the collection is
        of another model, tokenizer or layout, or damaged.
        """
        self.layout = layout
        self.likely_words = layout.likely_words
        self._connection = Connection(settings)
        try:
            self._collection = Collection(self._connection, settings, identity, layout)
            self._writer = Writer(self._collection.write, settings.batch, settings.queued, self._collection.count())
        except BaseException:
            self._connection.close()
            raise
        _OPEN.add(self)
        _close_all_in_the_end()

    def __len__(self) -> int:
        return len(self._writer)

    def __enter__(self) -> "RemoteStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, entries: Entries, documents_N: Tensor | None = None) -> None:
        """Add entries: they are found by the next search, and written when a batch of them has come together.

        Args: documents (N,): the numbers of the documents that they come from, 0 if not given. Raises DatastoreError where
        entries of before could not be written.
        """
        documents_N = torch.zeros(len(entries.values), dtype=torch.int64) if documents_N is None else documents_N
        self._connection.check_open()
        self._writer.put(as_stored(entries, self.layout), documents_N)

    def flush(self) -> None:
        """Wait until everything that was added is on the server; raises DatastoreError where it could not be written."""
        self._connection.check_open()
        self._writer.flush()

    def close(self) -> None:
        """Write what was added, and give up the connection; raises DatastoreError where it could not be written."""
        if self in _OPEN:
            _OPEN.discard(self)
            try:
                self.flush()
            finally:
                self._connection.close()
                self._writer.close()

    def search(self, queries_Cd: Tensor, count: int) -> Neighbours:
        """See `EntryStore.search`; raises DatastoreError where the server stays away, or entries could not be written."""
        self._connection.check_open()
        acknowledged, others = self._writer.unacknowledged()
        queries = queries_Cd.detach().to("cpu", torch.float32)
        parts = [self._search_server(queries, count, count + SPARE_CANDIDATES, acknowledged)]
        if others:
            waiting = joined(others)
            ends_C = torch.full((len(queries),), len(waiting.values))
            parts.append(search_entries(waiting, queries, ends_C, count).later(acknowledged))
        return nearest_of(parts, count).on(queries_Cd.device)

    def _search_server(self, queries_Cd: Tensor, count: int, limit: int, before: int) -> Neighbours:
        """Return the nearest of the first `before` entries, chosen among `limit` candidates or, where need be, more."""
        most, parts = min(before, MOST_CANDIDATES), []
        if not most:
            return nothing(no_entries(self.layout), len(queries_Cd), count)
        limit = min(limit, most)
        for queries in queries_Cd.split(self._collection.queries_at_once(limit, before)):
            candidates = self._collection.search(queries, limit, before)
            rows_Cn = pad(candidates.rows_Cn, (0, max(0, count - candidates.rows_Cn.shape[1])), value=-1)
            places_Cn, wanted = rows_Cn.clamp(min=0), rows_Cn.shape[1]
            rows_Cn, distances_Cn, _ = nearest_candidates(candidates.entries.keys, places_Cn, rows_Cn, queries, wanted)
            found = neighbours(candidates.entries, candidates.positions_N, rows_Cn[:, :count], distances_Cn[:, :count])
            if limit < most:
                farthest_C, last_C = distances_Cn[:, limit - 1], distances_Cn[:, count - 1]
                undecided = (farthest_C.isfinite() & (farthest_C <= last_C * (1 + ROUNDING))).nonzero()[:, 0]
                if len(undecided):
                    again = self._search_server(queries[undecided], count, MORE_CANDIDATES * limit, before)
                    for tensor, better in zip(_tensors(found), _tensors(again), strict=True):
                        tensor[undecided] = better
            parts.append(found)
        return Neighbours.joined(parts)


_OPEN: set[RemoteStore] = set()


@functools.cache
def _close_all_in_the_end() -> None:
    """Have what is still open closed while Python's threads run: Milvus Lite answers nobody any more once they do not."""
    threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def _close_all() -> None:
    for store in list(_OPEN):
        try:
            store.close()
        except DatastoreError as error:
            logging.getLogger(__name__).error("%s", error)


def search_entries(entries: Entries, queries_Cd: Tensor, ends_C: Tensor, count: int) -> Neighbours:
    """Return the nearest of these entries, of which query c sees those before ends[c]; on a CPU, in single precision."""
    if not len(entries.values):
        return nothing(entries, len(queries_Cd), count)
    keys_Nd = entries.keys.float()
    search = Search(keys_Nd, keys_Nd.square().sum(1), queries_Cd, torch.zeros_like(ends_C), ends_C)
    rows_CK, distances_CK = nearest(search, count)
    return neighbours(entries, torch.arange(len(keys_Nd)), rows_CK, distances_CK)


def neighbours(entries: Entries, positions_N: Tensor, rows_CK: Tensor, distances_CK: Tensor) -> Neighbours:
    """Return the entries in the given rows, which were written at the given positions; a place is empty where its row is -1."""
    empty_CK, filled_CK = rows_CK < 0, rows_CK.clamp(min=0)
    found = Entries(*(tensor[filled_CK] for tensor in entries.tensors()))
    for tensor in found.tensors():
        tensor[empty_CK] = 0
    return Neighbours(found, distances_CK, positions_N[filled_CK].masked_fill_(empty_CK, -1))


def nothing(like: Entries, queries: int, count: int) -> Neighbours:
    """Return neighbours of which every place is empty, in the types of these entries."""
    entries = Entries(*(tensor.new_zeros(queries, count, *tensor.shape[1:]) for tensor in like.tensors()))
    return Neighbours(entries, torch.full((queries, count), torch.inf), torch.full((queries, count), -1))


def _tensors(found: Neighbours) -> tuple[Tensor, ...]:
    return (*found.entries.tensors(), found.squared_distances, found.positions)
