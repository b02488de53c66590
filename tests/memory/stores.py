"""Small datastores of entries that are known by their number."""

from pathlib import Path

import torch

from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore

D, LIKELY = 8, 3


IDENTITY = Identity("a" * 64, "b" * 64)


def entries_from(first: int, count: int) -> Entries:
    """Entries that are known by their number, exact in half precision."""
    numbers = torch.arange(first, first + count)
    generator = torch.Generator().manual_seed(first * 1000 + count)
    keys = torch.randint(-64, 64, (count, D), generator=generator) / 16
    keys[:, 0] = (numbers % 1000) / 8
    return Entries(
        keys,
        numbers * 7 % 1009,
        numbers.float() / 3,
        (numbers[:, None] + torch.arange(LIKELY)).int(),
        ((numbers[:, None] % 8 + torch.arange(LIKELY)) / 16),
    )


def make(folder: Path, *counts: int, layout: Layout | None = None) -> Datastore:
    store = Datastore.create(folder, IDENTITY, layout or Layout(D, LIKELY))
    for number, count in enumerate(counts):
        store.add(entries_from(len(store), count), torch.full((count,), number))
    return store


def all_entries(*counts: int) -> Entries:
    parts, first = [], 0
    for count in counts:
        parts.append(entries_from(first, count))
        first += count
    return Entries(*(torch.cat(column) for column in zip(*(part.tensors() for part in parts), strict=True)))


def assert_finds_the_nearest(store: Datastore, expected: Entries, queries: torch.Tensor, count: int) -> None:
    found = store.search(queries, count)
    distances = (expected.keys - queries[:, None]).square().sum(-1)
    for row, of_row in enumerate(distances):
        newest_first = of_row.flip(0).argsort(stable=True)[:count]
        order = (len(of_row) - 1 - newest_first).tolist()
        assert found.positions[row, : len(order)].tolist() == order
        torch.testing.assert_close(found.squared_distances[row, : len(order)], of_row[order])
        for one, other in zip(found.entries.tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(one[row, : len(order)], other[order], check_dtype=False)
        assert (found.positions[row, len(order) :] == -1).all()
        assert found.squared_distances[row, len(order) :].isinf().all()


def queries(count: int = 20) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(5)) * 3 + 20
