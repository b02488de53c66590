"""The datastore itself: opened, added to, indexed and searched.

    store = Datastore.open("runs/ptb/memory", identity)
    neighbours = store.search(hidden_states, 32)

One process may write at a time; any number may read meanwhile and see what was acknowledged when they opened it.

Dimensions: `C` queries, `K` neighbours, `N` entries, `d` hidden size, `c` likely words.
"""

import contextlib
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.datastore import index as indexes
from mbpa_lm.memory.datastore.entry_files import EntryFiles
from mbpa_lm.memory.datastore.exact import Keys, search_blocks, with_norms
from mbpa_lm.memory.datastore.indexing import OnIndexing, longer_index, new_index
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
from mbpa_lm.memory.datastore.open_index import OpenIndex, check_fits
from mbpa_lm.memory.datastore.plausible import check_plausible
from mbpa_lm.memory.datastore.unchanged import FILE as UNCHANGED_FILE
from mbpa_lm.memory.datastore.unchanged import are_unchanged, note_unchanged
from mbpa_lm.system.durable import file_hash, hold, sync

INDEXED_SHARE = 0.9
"""Share of the entries below which an index is to be made again: the others are searched one by one."""
LOCK = ".lock"
OnProgress = Callable[[int], None]


class Datastore:
    """Entries on disk, searched through an index and, where that does not reach, exactly."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        memory_limit: int,
        gpus: indexes.Gpus,
        lock: int | None,
        unchecked: bool,
        vocabulary_size: int = 0,
    ) -> None:
        """Use `open` or `create`."""
        self.folder = folder
        self.manifest = manifest
        self._memory_limit, self._gpus, self._lock, self._vocabulary_size = memory_limit, gpus, lock, vocabulary_size
        this = weakref.ref(self)  # a circle would keep the files open until the next collection

        def keys_of_index(rows: np.ndarray) -> np.ndarray:
            store = this()
            assert store is not None
            return store._keys_of_index(rows)

        self._files = EntryFiles(folder, manifest.layout, manifest.entries, memory_limit, manifest.keys_from, keys_of_index)
        self._index: OpenIndex | None = None
        self._last_keys: tuple[tuple[int, int], Keys] | None = None
        if not unchecked:
            self._check_unchanged()
            if lock is None:  # who writes may never search
                self._open_index()

    @classmethod
    def create(cls, folder: Path, identity: Identity, layout: Layout, memory_limit: int = 0) -> "Datastore":
        """Make an empty one that can be written; raises DatastoreError where the folder holds something already."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync(folder.parent)
            files = EntryFiles(folder, layout, 0)
            if not (folder / FILE).exists():
                files.remove()  # what a creation that was interrupted has left
                (folder / f".{FILE}.saving").unlink(missing_ok=True)
            if {path.name for path in folder.iterdir()} - {LOCK, UNCHANGED_FILE}:
                is_memory = (folder / FILE).exists()
                advice = "add to the memory with mbpa-memory add" if is_memory else f"put its {FILE} back, if it was a memory"
                raise DatastoreError(f"{folder} is not empty; name another folder, or {advice}")
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
        vocabulary_size: int = 0,
    ) -> "Datastore":
        """Open an existing one.

        Args: identity of the model that will search it, which must be the one that wrote it; memory_limit: resident bytes that
        the process is to stay under, 0 for none; gpus: where the index is searched; unchecked: only to be verified, nothing is
        read now; vocabulary_size of the model that will search it, whose words all that is found must be, 0 for not looking.
        Raises DatastoreError where it is missing, damaged, of another model, or, to be written, held by another process.
        """
        manifest = read_manifest(folder)
        if identity is not None:
            check_identity(folder, manifest.identity, identity)
        while not writable:
            try:
                return cls(folder, manifest, memory_limit, gpus, None, unchecked, vocabulary_size)
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
    def memory_limit(self) -> int:
        """Return how many resident bytes the process is to stay under, 0 for no limit."""
        return self._memory_limit

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
        note_unchanged(self.folder, self._file_names())

    def search(self, queries_Cd: Tensor, count: int) -> Neighbours:
        """See `EntryStore.search`; how many of the nearest an approximate index finds is in `manifest.index.recall`."""
        found = nearest_entries(self._files, self.candidates(queries_Cd, count), queries_Cd, count)
        self._files.give_back()
        if self._vocabulary_size:
            check_plausible(found, self._vocabulary_size, self.folder)
        return found

    def candidates(self, queries_Cd: Tensor, count: int) -> Tensor:
        """Return rows (C, n) that hold the nearest entries and some more, -1 where there are fewer; no entry is read for it."""
        queries_Cd = queries_Cd.detach().float().cpu().contiguous()
        indexed, found, index = 0, [], self._open_index()
        if index is not None:
            indexed = index.record.entries
            found.append(torch.from_numpy(index.candidates(queries_Cd.numpy(), count)))
        if indexed < len(self):
            found.append(search_blocks(self._keys, indexed, len(self), queries_Cd, count))
        if not found:
            return torch.full((len(queries_Cd), count), -1)
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

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
        check_fits(self.folder, chosen, len(self), self.manifest.layout, self._memory_limit)
        found = None
        if self.manifest.keys_from:
            found = longer_index(self.folder, self.manifest, chosen, self._files, on_progress)
        elif chosen != "flat" and len(self) > 1:
            found = new_index(self.folder, self.manifest, chosen, self._files, on_progress)
        by_hand = kind is not None or (self.manifest.index is not None and self.manifest.index.by_hand)
        record = None if found is None else replace(found[1], by_hand=by_hand)
        manifest = replace(self.manifest, index=record)
        try:
            write_manifest(self.folder, manifest)
        except OSError as error:
            raise DatastoreError(f"the index of {self.folder} could not be recorded: {reason(error)}") from None
        self.manifest = manifest
        self._index = None if found is None or record is None else OpenIndex(found[0], record, self._gpus)
        self._remove_leftovers()
        note_unchanged(self.folder, self._file_names())

    def give_up_keys(self) -> None:
        """Keep keys in the index alone, which must hold all entries; they are then as exact as it keeps them.

        Keys that are added later lie in the file until this is done again. Raises DatastoreError where there is no such index.
        """
        self._require_lock()
        record = self.manifest.index
        if record is None or record.entries < len(self):
            raise DatastoreError(f"{self.folder} has no index over all its entries; make one first, with mbpa-memory index")
        checksums = {**self.manifest.checksums, self._files.columns["keys"].file: []}
        manifest = replace(self.manifest, keys_from=len(self), checksums=checksums)
        try:
            write_manifest(self.folder, manifest)
            self._files.give_up_keys(len(self))
        except OSError as error:
            raise DatastoreError(f"the keys of {self.folder} could not be given up: {reason(error)}") from None
        self.manifest = manifest
        note_unchanged(self.folder, self._file_names())

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

    def _keys_of_index(self, rows: np.ndarray) -> np.ndarray:
        """Return the keys (n, d) in given rows as the index keeps them."""
        index = self._open_index()
        assert index is not None
        return index.keys(rows)

    def _keys(self, begin: int, end: int) -> Keys:
        """Return keys as they are searched; those behind the index are kept so where they are few, for the next search."""
        if end - begin > indexes.EXACT_UP_TO:
            return with_norms(self._files.keys(begin, end))
        if self._last_keys is None or self._last_keys[0] != (begin, end):
            self._last_keys = ((begin, end), with_norms(self._files.keys(begin, end)))
        return self._last_keys[1]

    def _suitable_index(self) -> IndexKind:
        record = self.manifest.index
        if record is not None and (record.by_hand or self.manifest.keys_from):
            return record.kind
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
        self._files.cut_off_keys()
        record = self.manifest.index
        for path in [*self.folder.glob("index-*.faiss"), *self.folder.glob(".*.saving")]:
            if record is None or path.name != record.file:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _open_index(self) -> OpenIndex | None:
        """Return the index, read when it is first asked for; None where there is none."""
        record = self.manifest.index
        if record is not None and self._index is None:
            self._index = OpenIndex.read(self.folder, record, self.manifest.layout, self._memory_limit, self._gpus)
        return self._index

    def _check_unchanged(self) -> None:
        """Refuse files whose content is not what was written.

        Those of the size and time that they had when they were last found whole are not read again.
        """
        if not are_unchanged(self.folder, self._file_names()):
            damaged = self.damaged()
            if damaged is not None:
                raise DatastoreError(
                    f"{self.folder / damaged} is not what was written: it was cut short or altered; put it back, or build the "
                    f"memory again"
                )
            note_unchanged(self.folder, self._file_names())

    def _file_names(self) -> list[str]:
        record = self.manifest.index
        return [FILE, *(column.file for column in self._files.columns.values()), *([] if record is None else [record.file])]


def _with(known: tuple[Source, ...], new: tuple[Source, ...]) -> tuple[Source, ...]:
    return (*known, *(source for source in new if source not in known))
