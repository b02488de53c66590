"""Making an index of a datastore: trained on a sample, filled from the files, and searched as hard as the recall asks for.

Dimensions: `C` queries, `d` hidden size.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.datastore import index as indexes
from mbpa_lm.memory.datastore.entry_files import EntryFiles
from mbpa_lm.memory.datastore.exact import rows_at_once, search_blocks, with_norms
from mbpa_lm.memory.datastore.manifest import IndexKind, IndexRecord, Manifest
from mbpa_lm.system.durable import file_hash

RECALL_AT, RECALL_QUERIES, RECALL_WANTED = 32, 256, 0.95
OnIndexing = Callable[[str, int, int], None]
"""Is told what is being done, how far it is, and of how much."""


def new_index(
    folder: Path, manifest: Manifest, kind: IndexKind, files: EntryFiles, on_progress: OnIndexing
) -> tuple[Any, IndexRecord]:
    """Return an index over all keys, written into the folder beside the one in use, and its record."""
    count, path = manifest.entries, _next_file(folder, manifest)
    if count < indexes.LEAST_ENTRIES[kind]:
        raise DatastoreError(f"{count:,} entries are too few for {kind}, which needs {indexes.LEAST_ENTRIES[kind]:,}")
    cells = indexes.choose_cells(count, files.layout.hidden_size, files.memory_limit)
    try:
        index = _train(kind, files, count, cells, on_progress)
    except RuntimeError as error:
        raise DatastoreError(f"the index {kind} could not be trained: {reason(error)}; take another --kind") from None
    _fill(index, files, count, on_progress)
    effort, recall = _search_hard_enough(index, kind, files, count, cells, on_progress)
    indexes.write_index(index, path)
    search = {"effort": effort, "cells": cells}
    return index, IndexRecord(kind, path.name, count, path.stat().st_size, file_hash(path), search, recall)


def longer_index(
    folder: Path, manifest: Manifest, kind: IndexKind, files: EntryFiles, on_progress: OnIndexing
) -> tuple[Any, IndexRecord]:
    """Return the index with the keys that it does not hold yet, and its record: it is searched as hard as before.

    What it was trained on is not there any more. Raises DatastoreError where another kind is asked for.
    """
    record, path = manifest.index, _next_file(folder, manifest)
    assert record is not None
    if kind != record.kind:
        raise DatastoreError(f"the keys of {folder} are kept in its index alone, which is {record.kind} and stays so")
    index = indexes.read_index(folder / record.file, record, files.layout.hidden_size)
    _fill(index, files, manifest.entries, on_progress)
    indexes.write_index(index, path)
    written = replace(record, file=path.name, entries=manifest.entries, bytes=path.stat().st_size, sha256=file_hash(path))
    return index, written


def _next_file(folder: Path, manifest: Manifest) -> Path:
    """Return a path that no record names: an index is never written over the one in use."""
    used = 0 if manifest.index is None else int(manifest.index.file.removeprefix("index-").removesuffix(".faiss"))
    return folder / f"index-{used + 1}.faiss"


def _fill(index: Any, files: EntryFiles, count: int, on_progress: OnIndexing) -> None:
    at_once = rows_at_once(files.layout.hidden_size)
    while index.ntotal < count:
        index.add(files.keys(index.ntotal, min(index.ntotal + at_once, count)))
        on_progress("indexing", index.ntotal, count)


def _train(kind: IndexKind, files: EntryFiles, count: int, cells: int, on_progress: OnIndexing) -> Any:
    rows = np.linspace(0, count - 1, indexes.training_keys(kind, cells, count)).astype(np.int64)
    sample = files.rows("keys", rows).float().numpy()
    steps = indexes.CLUSTERING_STEPS
    return indexes.train_index(kind, sample, cells, lambda step: on_progress("training the index", step, steps))


def _search_hard_enough(
    index: Any, kind: IndexKind, files: EntryFiles, count: int, cells: int, on_progress: OnIndexing
) -> tuple[int, dict[str, float]]:
    """Double the effort until the recall is as wanted; return the effort, and the recall against exact search.

    Queries are keys from everywhere in the memory; that each finds itself does not count.
    """
    at, rows = min(RECALL_AT, count - 1), np.linspace(0, count - 1, min(RECALL_QUERIES, count)).astype(np.int64)
    queries = files.rows("keys", rows).float()
    on_progress("measuring recall", 0, 1)
    nearest = search_blocks(lambda begin, end: with_norms(files.keys(begin, end)), 0, count, queries, at + 1).numpy()
    most = indexes.most_effort(kind, cells, count)
    effort = min(indexes.first_effort(kind), most)
    while True:
        indexes.set_effort(index, kind, effort)
        found = index.search(queries.numpy(), indexes.candidates(kind, at + 1))[1]
        pairs = zip(nearest, found, rows, strict=True)
        hits = sum(len(set(wanted) & set(candidates) - {row}) for wanted, candidates, row in pairs)
        recall = hits / sum(len(set(wanted) - {row}) for wanted, row in zip(nearest, rows, strict=True))
        if recall >= RECALL_WANTED or effort >= most:
            on_progress("measuring recall", 1, 1)
            return effort, {"at": at, "recall": recall, "queries": len(rows)}
        effort = min(2 * effort, most)
