"""The datastore itself: opened, added to, indexed and searched.

    store = Datastore.open("runs/ptb/memory", identity)
    neighbours = store.search(hidden_states, 32)

One process may write at a time; any number may read meanwhile and see what was acknowledged when they opened it.

Dimensions: `C` queries, `K` neighbours, `N` entries, `d` hidden size, `c` likely words.
"""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.durable import file_hash, hold, replace_json, sync
from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.datastore import index as indexes
from mbpa_lm.memory.datastore.entry_files import EntryFiles
from mbpa_lm.memory.datastore.exact import search_blocks
from mbpa_lm.memory.datastore.indexing import OnIndexing, new_index
from mbpa_lm.memory.datastore.manifest import (
    FILE,
    Identity,
    IndexKind,
    Layout,
    Manifest,
    Source,
    check_identity,
    read_manifest,
    write_manifest,
)
from mbpa_lm.memory.datastore.measuring import nearest_entries, read_entries
from mbpa_lm.memory.nearest_plain import SPARE_CANDIDATES

INDEXED_SHARE = 0.9
"""Share of the entries below which an index is to be made again: the others are searched one by one."""
LOCK, UNCHANGED = ".lock", "unchanged.json"
OnProgress = Callable[[int], None]


class Datastore:
    """Entries on disk, searched through an index and, where that does not reach, exactly."""

    def __init__(
        self, folder: Path, manifest: Manifest, memory_limit: int, gpus: indexes.Gpus, lock: int | None, unchecked: bool
    ) -> None:
        """Use `open` or `create`."""
        self.folder = folder
        self.manifest = manifest
        self._memory_limit, self._gpus, self._lock = memory_limit, gpus, lock
        self._files = EntryFiles(folder, manifest.layout, manifest.entries, memory_limit)
        self._index: Any = None
        self._last_keys: tuple[tuple[int, int], np.ndarray] | None = None
        if not unchecked:
            self._check_unchanged()
            if lock is None:  # who writes may never search
                self._load_index()

    @classmethod
    def create(cls, folder: Path, identity: Identity, layout: Layout, memory_limit: int = 0) -> "Datastore":
        """Make an empty one that can be written; raises DatastoreError where the folder holds something already."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync(folder.parent)
            files = EntryFiles(folder, layout, 0)
            if not (folder / FILE).exists():
                files.remove()  # what a creation that was interrupted has left
            if {path.name for path in folder.iterdir()} - {LOCK, UNCHANGED}:
                raise DatastoreError(f"{folder} is not empty; name another folder, or add to the memory with mbpa-memory add")
            manifest = Manifest(identity, layout)
            files.create()
            write_manifest(folder, manifest)
        except OSError as error:
            raise DatastoreError(f"{folder} cannot be written: {reason(error)}") from None
        return cls.open(folder, identity, memory_limit, writable=True)

    @classmethod
    def open(
        cls,
        folder: Path,
        identity: Identity | None = None,
        memory_limit: int = 0,
        writable: bool = False,
        gpus: indexes.Gpus = "none",
        unchecked: bool = False,
    ) -> "Datastore":
        """Open an existing one.

        Args: identity of the model that will search it, which must be the one that wrote it; memory_limit: resident bytes that
        the process is to stay under, 0 for none; gpus: where the index is searched; unchecked: only to be verified, nothing is
        read now. Raises DatastoreError where it is missing, damaged, of another model, or, to be written, held by another
        process.
        """
        manifest = read_manifest(folder)
        if identity is not None:
            check_identity(folder, manifest.identity, identity)
        while not writable:
            try:
                return cls(folder, manifest, memory_limit, gpus, None, unchecked)
            except DatastoreError:
                now = read_manifest(folder)
                if now == manifest:
                    raise
                manifest = now  # another process has changed it since
        lock = hold(folder / LOCK, folder)
        try:
            store = cls(folder, read_manifest(folder), memory_limit, gpus, lock, unchecked)
            store._remove_leftovers()
            return store
        except BaseException:
            os.close(lock)
            raise

    def __len__(self) -> int:
        return self.manifest.entries

    @property
    def likely_words(self) -> int:
        """See `EntryStore.likely_words`."""
        return self.manifest.layout.likely_words

    def __enter__(self) -> "Datastore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, entries: Entries, documents_N: Tensor | None = None, *sources: Source) -> None:
        """Add entries; they are on disk, and found by the next search, when this returns.

        Args: documents (N,): the numbers of the documents that they come from, 0 if not given; sources: the texts whose records
        are to be written with them. Raises DatastoreError where they cannot be written; it says how many are there.
        """
        count = len(entries.values)
        self._require_lock()
        if not count:
            return
        documents_N = torch.zeros(count, dtype=torch.int64) if documents_N is None else documents_N
        try:
            checksums = self._files.append(entries, documents_N[:, None], self.manifest.checksums)
            manifest = replace(
                self.manifest,
                entries=self.manifest.entries + count,
                documents=max(self.manifest.documents, int(documents_N.max()) + 1),
                checksums=checksums,
                sources=_with(self.manifest.sources, sources),
            )
            write_manifest(self.folder, manifest)
        except OSError as error:
            self._adopt(read_manifest(self.folder))  # it may have been replaced, and only not be known to be on disk
            raise DatastoreError(
                f"entries could not be added to {self.folder}: {reason(error)}; the {len(self):,} that it counts are whole"
            ) from None
        self._adopt(manifest)
        self._note_unchanged()

    def search(self, queries_Cd: Tensor, count: int) -> Neighbours:
        """See `EntryStore.search`; how many of the nearest an approximate index finds is in `manifest.index.recall`."""
        queries = np.ascontiguousarray(queries_Cd.detach().float().cpu().numpy())
        return nearest_entries(self._files, self._candidates(queries, count), queries_Cd, count)

    def needs_index(self, kind: IndexKind | None = None) -> bool:
        """Say whether there is another index than asked for (None: than the size asks for), or one of far fewer entries."""
        record = self.manifest.index
        if record is None:
            return len(self) > 1 and (kind or self._suitable_index()) != "flat"
        return record.kind != (kind or self._suitable_index()) or record.entries < INDEXED_SHARE * len(self)

    def build_index(self, kind: IndexKind | None = None, on_progress: OnIndexing = lambda what, done, total: None) -> None:
        """Index all entries there are, and keep it; the old index serves until the new one is on disk.

        Args: kind, None for the one that the size asks for; on_progress is told what is done, how far, of how much.
        """
        self._require_lock()
        chosen = kind or self._suitable_index()
        indexes.check_gpus(chosen, self._gpus)
        self._check_fits(chosen, len(self))
        record, index = None, None
        if chosen != "flat" and len(self) > 1:
            index, record = new_index(chosen, self._files, len(self), self._next_index_file(), on_progress)
            record = replace(record, by_hand=kind is not None)
        manifest = replace(self.manifest, index=record)
        try:
            write_manifest(self.folder, manifest)
        except OSError as error:
            raise DatastoreError(f"the index of {self.folder} could not be recorded: {reason(error)}") from None
        self.manifest = manifest
        self._index = None if index is None else indexes.to_gpus(index, self._gpus)
        self._remove_leftovers()
        self._note_unchanged()

    def damaged(self, on_progress: OnProgress = lambda size: None) -> str | None:
        """Return which file is not what was written, None where all are; reads everything. `on_progress` is told bytes."""
        found = self._files.damaged(self.manifest.checksums, on_progress)
        record = self.manifest.index
        if found is None and record is not None:
            path = self.folder / record.file
            if not path.is_file() or path.stat().st_size != record.bytes or file_hash(path) != record.sha256:
                return record.file
            on_progress(record.bytes)
        return found

    def entries_between(self, begin: int, end: int) -> tuple[Entries, Tensor]:
        """Return consecutive entries as they are stored, and the documents (n,) that they come from."""
        documents = self._files.between("documents", begin, end)[:, 0]
        read = partial(self._files.between, begin=begin, end=end)
        return read_entries(read, self.likely_words), documents

    def column_between(self, name: str, begin: int, end: int) -> Tensor:
        """Return consecutive rows (n, width) of one column."""
        return self._files.between(name, begin, end)

    def _candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return rows (C, k) that hold the nearest entries and some more, -1 where there are fewer."""
        indexed, found, record = 0, [], self.manifest.index
        if record is not None:
            if self._index is None:
                self._load_index()
            indexed = record.entries
            rows = self._index.search(queries, indexes.candidates(record.kind, count))[1]
            found.append(np.where(rows < indexed, rows, -1))
        if indexed < len(self):
            found.append(search_blocks(self._keys, indexed, len(self), queries, count + SPARE_CANDIDATES)[1])
        return np.concatenate(found, axis=1) if found else np.full((len(queries), count), -1)

    def _keys(self, begin: int, end: int) -> np.ndarray:
        """Return keys in single precision; those behind the index are kept so where they are few, for the next search."""
        if end - begin > indexes.EXACT_UP_TO:
            return self._files.keys(begin, end)
        if self._last_keys is None or self._last_keys[0] != (begin, end):
            self._last_keys = ((begin, end), self._files.keys(begin, end))
        return self._last_keys[1]

    def _suitable_index(self) -> IndexKind:
        if self.manifest.index is not None and self.manifest.index.by_hand:
            return self.manifest.index.kind
        return indexes.choose_kind(len(self), self.manifest.layout, self._memory_limit)

    def _require_lock(self) -> None:
        if self._lock is None:
            raise DatastoreError(f"{self.folder} was opened to be read; open it to be written")

    def _adopt(self, manifest: Manifest) -> None:
        """Show what a manifest on disk counts."""
        if manifest.entries != len(self):
            self._files.acknowledge(manifest.entries)
        self.manifest = manifest

    def _remove_leftovers(self) -> None:
        """Remove what interrupted writes have left."""
        record = self.manifest.index
        for path in [*self.folder.glob("index-*.faiss"), *self.folder.glob(".*.saving")]:
            if record is None or path.name != record.file:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _next_index_file(self) -> Path:
        """Return a path that no record names: an index is never written over the one in use."""
        record = self.manifest.index
        number = 1 if record is None else int(record.file.removeprefix("index-").removesuffix(".faiss")) + 1
        return self.folder / f"index-{number}.faiss"

    def _load_index(self) -> None:
        record = self.manifest.index
        if record is not None:
            indexes.check_gpus(record.kind, self._gpus)
            self._check_fits(record.kind, record.entries)
            index = indexes.read_index(self.folder / record.file, record, self.manifest.layout.hidden_size)
            indexes.set_effort(index, record.kind, record.search["effort"])
            self._index = indexes.to_gpus(index, self._gpus)

    def _check_fits(self, kind: IndexKind, entries: int) -> None:
        if indexes.too_large(kind, entries, self.manifest.layout, self._memory_limit):
            raise DatastoreError(
                f"an index {kind} over the {entries:,} entries of {self.folder} takes more than a third of the "
                f"{self._memory_limit / (1 << 30):g} GiB that memory.resident_gib allows; allow more, or make a smaller one: "
                f"mbpa-memory index {self.folder} --kind ivf_pq"
            )

    def _check_unchanged(self) -> None:
        """Refuse files whose content is not what was written.

        Those of the size and time that they had when they were last found whole are not read again.
        """
        try:
            known = json.loads((self.folder / UNCHANGED).read_text())
        except (OSError, ValueError):
            known = None
        if known != self._stamps():
            damaged = self.damaged()
            if damaged is not None:
                raise DatastoreError(
                    f"{self.folder / damaged} is not what was written: it was cut short or altered; put it back, or build the "
                    f"memory again"
                )
            self._note_unchanged()

    def _note_unchanged(self) -> None:
        with contextlib.suppress(OSError):  # a folder that cannot be written is read again each time
            replace_json(self.folder / UNCHANGED, self._stamps())

    def _stamps(self) -> dict[str, list[int]]:
        record = self.manifest.index
        names = [FILE, *(column.file for column in self._files.columns.values()), *([] if record is None else [record.file])]
        stamps = {}
        for name in names:
            path = self.folder / name
            if path.is_file():
                stamps[name] = [path.stat().st_size, path.stat().st_mtime_ns]
        return stamps


def _with(known: tuple[Source, ...], new: tuple[Source, ...]) -> tuple[Source, ...]:
    return (*known, *(source for source in new if source not in known))
