"""The index of a datastore in memory: read, searched, and asked for the keys that it holds.

Dimensions: `C` queries, `d` hidden size.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.datastore import index as indexes
from mbpa_lm.memory.datastore.cells import Cells
from mbpa_lm.memory.datastore.manifest import IndexKind, IndexRecord, Layout


class OpenIndex:
    """An index, where it is searched and, for its keys, on the CPU."""

    def __init__(self, index: Any, record: IndexRecord, gpus: indexes.Gpus) -> None:
        """Args: gpus: where it is to be searched."""
        indexes.set_effort(index, record.kind, record.search["effort"])
        self.record = record
        self.searched = indexes.to_gpus(index, gpus)
        self._on_cpu = index
        self._cells: Cells | None = None
        if record.kind in indexes.WITH_CELLS and self.searched is index:
            self._cells = Cells.of(index)

    @classmethod
    def read(cls, folder: Path, record: IndexRecord, layout: Layout, memory_limit: int, gpus: indexes.Gpus) -> "OpenIndex":
        """Read it from a datastore's folder; raises DatastoreError where it is damaged, too large, or not for GPUs."""
        indexes.check_gpus(record.kind, gpus)
        check_fits(folder, record.kind, record.entries, layout, memory_limit)
        index = indexes.read_index(folder / record.file, record, layout.hidden_size, frugal=bool(memory_limit))
        return cls(index, record, gpus)

    def candidates(self, queries_Cd: np.ndarray, count: int) -> np.ndarray:
        """Return rows (C, n) among which the nearest `count` are to be sought, -1 for none."""
        wanted = indexes.candidates(self.record.kind, count)
        if self._cells is None:
            rows = self.searched.search(queries_Cd, wanted)[1]
        else:
            rows = self._cells.search(queries_Cd, wanted, self.record.search["effort"])
        return np.where(rows < self.record.entries, rows, -1)

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the keys (n, d) in given rows, in single precision, as the index keeps them."""
        if self.record.kind in indexes.WITH_CELLS and self._on_cpu.direct_map.no():
            self._on_cpu.make_direct_map()
        found: np.ndarray = self._on_cpu.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))
        return found


def check_fits(folder: Path, kind: IndexKind, entries: int, layout: Layout, memory_limit: int) -> None:
    """Raise DatastoreError where an index would take more of the memory that there may be than is for indexes."""
    if indexes.too_large(kind, entries, layout, memory_limit):
        raise DatastoreError(
            f"an index {kind} over the {entries:,} entries of {folder} takes more than a third of the "
            f"{memory_limit / (1 << 30):g} GiB that memory.resident_gib allows; allow more, or make a smaller one: "
            f"mbpa-memory index {folder} --kind ivf_pq"
        )
