"""A fixed number of entries of which not the oldest is given up: one by chance, or the one longest of no use.

    reservoir          every entry of the stream so far is kept with the same probability (Vitter 1985, algorithm R); what
                       chance decides depends on the seed and the entry's number alone
    least retrieved    the entry is given up that was retrieved, or written, longest ago

One position after the other, each at a cost that does not depend on the stream's length: what a position finds decides what
the next ones can find. Only the scalar products are made for a chunk at once.

Dimensions: `C` positions of a chunk, `K` neighbours, `d` hidden size, `N` entries.
"""

import hashlib
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.entry_tensors import EntryTensors
from mbpa_lm.memory.nearest import nearest
from mbpa_lm.memory.nearest_plain import Search

PRODUCTS_AT_ONCE = 256
GivenUp = Literal["reservoir", "least_retrieved"]


class SlotMemory:
    """`size` entries, searched exactly; see EntryTensors for `metric`, and `Memory.surprise`.

    Among more entries at one distance than are asked for, which are found is not defined; those found come newest first.
    """

    def __init__(
        self,
        size: int,
        hidden_size: int,
        likely_words: int,
        dtype: torch.dtype,
        device: torch.device,
        given_up: GivenUp,
        metric: Tensor | None = None,
        surprise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.likely_words = likely_words
        self.surprise = surprise
        self._size, self._given_up, self._seed = size, given_up, seed
        self._tensors = EntryTensors(size, hidden_size, likely_words, dtype, device, metric)
        self._positions_N = torch.empty(size, dtype=torch.int64, device=device)
        self._offered = self._written = 0
        self._used: OrderedDict[int, None] = OrderedDict()  # slots, the one longest of no use first

    def __len__(self) -> int:
        return min(self._written, self._size)

    def takes_products(self, size: int) -> bool:
        """See `Memory.takes_products`."""
        return False

    def read_and_write(
        self, entries: Entries, count: int, products: Tensor | None = None, stored: Tensor | None = None
    ) -> Neighbours:
        """See `Memory.read_and_write`."""
        stored_C = torch.ones_like(entries.values, dtype=torch.bool) if stored is None else stored
        parts = []
        for begin in range(0, len(entries.keys), PRODUCTS_AT_ONCE):
            rows = slice(begin, begin + PRODUCTS_AT_ONCE)
            parts += self._read_and_write_some(entries.rows(rows), stored_C[rows].tolist(), count)
        return Neighbours.joined(parts)

    def _read_and_write_some(self, entries: Entries, stored: list[bool], count: int) -> list[Neighbours]:
        queries_Cd = self._tensors.scaled(entries.keys)
        products_CN = queries_Cd @ self._tensors.searched_Nd.T
        own_CC = queries_Cd @ queries_Cd.T
        parts = []
        for position, is_stored in enumerate(stored):
            here = slice(position, position + 1)
            parts.append(self._read(queries_Cd[here], products_CN[here, : len(self)], count))
            slot = self._slot() if is_stored else None
            if slot is not None:
                self._tensors.write(slice(slot, slot + 1), entries.rows(here))
                self._positions_N[slot] = self._written
                self._written += 1
                products_CN[position + 1 :, slot] = own_CC[position + 1 :, position]
        return parts

    def _read(self, query_1d: Tensor, products_1N: Tensor, count: int) -> Neighbours:
        seen = len(self)
        ends_1 = torch.tensor([seen], device=query_1d.device)
        keys, norms = self._tensors.searched_Nd[:seen], self._tensors.squared_norms_N[:seen]
        search = Search(keys, norms, query_1d, torch.zeros_like(ends_1), ends_1)
        rows, distances = nearest(search, count, products_1N.contiguous())
        positions = torch.where(rows < 0, -1, self._positions_N[rows.clamp(min=0)])
        newest_first = positions.argsort(dim=1, descending=True)
        order = newest_first.gather(1, distances.gather(1, newest_first).argsort(dim=1, stable=True))
        rows = rows.gather(1, order)
        if self._given_up == "least_retrieved":
            for slot in reversed(rows[0].tolist()):  # the nearest is the last to be given up
                if slot >= 0:
                    self._used.move_to_end(slot)
        return Neighbours(self._tensors.at(rows, rows < 0), distances.gather(1, order), positions.gather(1, order))

    def _slot(self) -> int | None:
        """Return where the next entry goes, None where it is not kept."""
        self._offered += 1
        if self._given_up == "reservoir":
            slot = self._offered - 1 if self._offered <= self._size else self._chance(self._offered)
            return slot if slot < self._size else None
        slot = self._used.popitem(last=False)[0] if len(self) == self._size else len(self)
        self._used[slot] = None
        return slot

    def _chance(self, choices: int) -> int:
        """Return one of so many numbers from 0 on, all equally likely."""
        digest = hashlib.blake2b(f"{self._seed} {choices}".encode(), digest_size=16).digest()
        return int.from_bytes(digest, "little") % choices
