"""What every memory offers: read before you write, one position of the stream after another.

Dimensions: `C` positions of a chunk, `K` neighbours, `c` likely words an entry, `d` hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """What positions of the stream leave behind; the leading dimensions are those of the positions, here (C,)."""

    keys: Tensor  # (C, d) hidden states
    values: Tensor  # (C,) int64, the token that followed
    log_partitions: Tensor  # (C,), log sum of exp of the base model's logits at the key
    likely_words: Tensor  # (C, c) int32, the base model's likeliest next words at the key, in any order
    likely_probabilities: Tensor  # (C, c)

    def rows(self, rows: slice | Tensor) -> "Entries":
        """Return some of them."""
        return Entries(*(tensor[rows] for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the five tensors in the order in which they are declared."""
        return self.keys, self.values, self.log_partitions, self.likely_words, self.likely_probabilities


@dataclass(frozen=True)
class Neighbours:
    """The entries nearest to each query, nearest first; the newer first among equals.

    Where fewer than K entries were visible, the last places are empty: distance inf, position -1, zeros elsewhere.
    """

    entries: Entries  # (C, K, ...)
    squared_distances: Tensor  # (C, K), inf where empty
    positions: Tensor  # (C, K) int64, how many entries were written before this one; -1 where empty

    @classmethod
    def joined(cls, parts: Sequence["Neighbours"]) -> "Neighbours":
        """Return those of several runs of queries as one."""
        if len(parts) == 1:
            return parts[0]
        entries = Entries(*(torch.cat(column) for column in zip(*(part.entries.tensors() for part in parts), strict=True)))
        return cls(
            entries,
            torch.cat([part.squared_distances for part in parts]),
            torch.cat([part.positions for part in parts]),
        )

    def first(self, count: int) -> "Neighbours":
        """Return the nearest `count` of them."""
        if count >= self.positions.shape[1]:
            return self
        entries = Entries(*(tensor[:, :count] for tensor in self.entries.tensors()))
        return Neighbours(entries, self.squared_distances[:, :count], self.positions[:, :count])

    def of(self, positions: slice | Tensor) -> "Neighbours":
        """Return those of some of the positions."""
        entries = Entries(*(tensor[positions] for tensor in self.entries.tensors()))
        return Neighbours(entries, self.squared_distances[positions], self.positions[positions])

    def without_likely_words(self) -> "Neighbours":
        """Return them with no likely words."""
        entries = self.entries
        words, probabilities = entries.likely_words[..., :0], entries.likely_probabilities[..., :0]
        return replace(self, entries=replace(entries, likely_words=words, likely_probabilities=probabilities))

    def later(self, entries: int) -> "Neighbours":
        """Return them as written after so many others."""
        return replace(self, positions=torch.where(self.positions < 0, self.positions, self.positions + entries))

    def on(self, device: torch.device) -> "Neighbours":
        """Return them on a device."""
        entries = Entries(*(tensor.to(device) for tensor in self.entries.tensors()))
        return Neighbours(entries, self.squared_distances.to(device), self.positions.to(device))

    def at(self, columns: Tensor) -> "Neighbours":
        """Return those in the given columns (C, k)."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        entries = Entries(*(tensor[rows, columns] for tensor in self.entries.tensors()))
        return Neighbours(entries, self.squared_distances[rows, columns], self.positions[rows, columns])


def nearest_of(found: Sequence[Neighbours], count: int) -> Neighbours:
    """Return the nearest `count` of what several searches found for the same queries, the newer first among equals.

    Positions must be of one order: see `Neighbours.later`. Numbers come in the types of the last search.
    """
    like = found[-1].entries.tensors()
    columns = zip(*(each.entries.tensors() for each in found), strict=True)
    entries = (torch.cat([part.to(of.dtype) for part in parts], dim=1) for parts, of in zip(columns, like, strict=True))
    squared_distances = torch.cat([each.squared_distances for each in found], dim=1)
    positions = torch.cat([each.positions for each in found], dim=1)
    newest_first = positions.argsort(dim=1, descending=True)
    nearest_first = squared_distances.gather(1, newest_first).argsort(dim=1, stable=True)[:, :count]
    return Neighbours(Entries(*entries), squared_distances, positions).at(newest_first.gather(1, nearest_first))


def nearest_of_two(older: Neighbours, newer: Neighbours, count: int) -> Neighbours:
    """Do what `nearest_of` does for two searches, each nearest first, of which the second knows only newer entries."""
    both = torch.cat([newer.squared_distances, older.squared_distances], dim=1)  # the newer first among equals
    squared_distances, columns = both.sort(dim=1, stable=True)
    columns, of_newer = columns[:, :count], newer.squared_distances.shape[1]
    is_newer = columns < of_newer
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    of_older = older.squared_distances.shape[1]
    from_older = (rows * of_older + (columns - of_newer).clamp(min=0)).flatten()
    to_newer = is_newer.flatten().nonzero()[:, 0]
    from_newer = (rows * of_newer + columns).flatten()[to_newer]

    def merged(old: Tensor, new: Tensor) -> Tensor:
        found = old.flatten(0, 1).index_select(0, from_older).to(new.dtype)
        found[to_newer] = new.flatten(0, 1).index_select(0, from_newer)
        return found.view(*columns.shape, *old.shape[2:])

    entries = (merged(*parts) for parts in zip(older.entries.tensors(), newer.entries.tensors(), strict=True))
    return Neighbours(Entries(*entries), squared_distances[:, :count], merged(older.positions, newer.positions))


class EntryStore(Protocol):
    """Entries that are there before the stream begins, and stay as they are while it is read."""

    @property
    def likely_words(self) -> int:
        """Return how many likely words an entry keeps (c)."""
        ...

    def __len__(self) -> int: ...

    def search(self, queries_Cd: Tensor, count: int) -> Neighbours:
        """Return the nearest entries of each query, nearest first, the newer first among equals; distances are exact."""
        ...


class Memory(Protocol):
    """Entries that a stream leaves behind."""

    likely_words: int
    """How many likely words an entry keeps (c)."""
    surprise: float
    """Positions whose token the base model expected better than with so many nats are not to be stored; 0: all are."""

    def __len__(self) -> int:
        """Return the number of entries that the next query would see."""
        ...

    def takes_products(self, size: int) -> bool:
        """Say whether scalar products with the last `size` entries before each query are just what a search needs."""
        ...

    def read_and_write(
        self, entries: Entries, count: int, products: Tensor | None = None, stored: Tensor | None = None
    ) -> Neighbours:
        """Answer each position's query, then store that position, in the order of the stream.

        Position i of the chunk sees what was stored before the chunk and positions 0 to i - 1 of it: the result is
        the same however the stream is cut into chunks.

        Args: entries of the chunk's positions, whose keys are the queries; count: K; products (C, N) of the queries with
        all keys so far or the last of them, the chunk's own at the end, where the caller has them and `takes_products`;
        stored (C,) bool: which positions are stored, all where it is not given; products are of no use with it.
        """
        ...


@runtime_checkable
class SearchesAhead(Protocol):
    """A memory far away, whose search can run while the model reads the next chunk."""

    def begin(self, keys_Cd: Tensor, count: int) -> None:
        """Start the search of a chunk; the next `read_and_write`, which must be of the same keys, waits for what it finds."""
        ...
