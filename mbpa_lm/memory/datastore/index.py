"""Indexes over the keys of a datastore: which kind for which size, how it is trained, read, written and put on GPUs.

An index proposes candidates; the datastore measures them again against its own keys. So every kind gives distances of one
convention, squared Euclidean in single precision from the stored keys, and what an index lacks in precision it makes up for
with more candidates.

    flat       every key, in blocks from the file; no index at all
    ivf_flat   cells of keys in half precision: a query looks into the nearest cells
    ivf_pq     cells of product-quantized keys, about 64 bytes a key, for what half precision cannot hold in memory
    hnsw       a graph over keys in half precision: fast, and twice as large
    cagra      a graph built on a GPU, searched there, or as hnsw on a CPU; where FAISS is built with it

Dimensions: `N` keys, `d` hidden size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.datastore.manifest import IndexKind, IndexRecord, Layout
from mbpa_lm.memory.nearest_faiss import has_gpu_build
from mbpa_lm.memory.nearest_plain import SPARE_CANDIDATES
from mbpa_lm.system.durable import replacing

EXACT_UP_TO = 20_000
"""Entries up to which every key is measured."""
HALF_PRECISION_UP_TO = 4_000_000
"""Entries up to which the index keeps keys in half precision, where no limit says otherwise."""
TRAINED_ON_PER_CELL = 40
CODE_BYTES, LARGEST_PART = 64, 24
"""Bytes of a code, and most numbers of a key that share one."""
LEAST_ENTRIES = {"ivf_flat": 2, "hnsw": 2, "ivf_pq": 1000, "cagra": 1000}
"""Entries from which an index can be trained."""
REFINED = 4
"""ivf_pq: candidates for each neighbour that is wanted."""
LINKS = 32
WITH_CELLS = ("ivf_flat", "ivf_pq")
CLUSTERING_STEPS = 10
Gpus = Literal["none", "replicate", "shard"]


def choose_kind(entries: int, layout: Layout, memory_limit: int = 0) -> IndexKind:
    """Return the kind of index for so many entries, where the process may have so many resident bytes (0: no limit)."""
    if entries <= EXACT_UP_TO:
        return "flat"
    fits = not too_large("ivf_flat", entries, layout, memory_limit) if memory_limit else entries <= HALF_PRECISION_UP_TO
    return "ivf_flat" if fits else "ivf_pq"


def too_large(kind: IndexKind, entries: int, layout: Layout, memory_limit: int) -> bool:
    """Say whether an index would take more than its third of the resident bytes that there may be (0: any number)."""
    return bool(memory_limit) and index_bytes(kind, entries, layout) > memory_limit // 3


def index_bytes(kind: IndexKind, entries: int, layout: Layout) -> int:
    """Return about how many bytes of memory an index takes, beside its centroids."""
    d = layout.hidden_size
    keys = {"flat": 0, "ivf_flat": 2 * d, "ivf_pq": _code_parts(d), "hnsw": 2 * d + 8 * LINKS, "cagra": 4 * d + 8 * LINKS}
    return entries * (keys[kind] + (8 if kind in WITH_CELLS else 0))


def choose_cells(entries: int, hidden_size: int, memory_limit: int = 0) -> int:
    """Return the number of cells: 4 sqrt(N), and no more than a twelfth of the limit holds keys to train them on."""
    most = memory_limit // 12 // (TRAINED_ON_PER_CELL * 4 * hidden_size) if memory_limit else entries
    return max(1, min(round(4 * math.sqrt(entries)), entries // TRAINED_ON_PER_CELL, most))


def training_keys(kind: IndexKind, cells: int, entries: int) -> int:
    """Return how many keys an index wants to be trained on."""
    return entries if kind == "cagra" else min(entries, max(cells * TRAINED_ON_PER_CELL, 10_000))


def train_index(kind: IndexKind, keys_Nd: np.ndarray, cells: int, on_progress: Callable[[int], None]) -> Any:
    """Return an empty faiss.Index trained on a sample of keys; `on_progress` is told the steps done of CLUSTERING_STEPS."""
    d = keys_Nd.shape[1]
    index: Any
    if kind == "hnsw":
        index = faiss.index_factory(d, f"HNSW{LINKS},SQfp16", faiss.METRIC_L2)
        index.hnsw.efConstruction = 80
        index.train(keys_Nd)
        return index
    if kind == "cagra":
        return _cagra(keys_Nd)
    coarse = faiss.IndexFlatL2(d)
    coarse.add(_centroids(keys_Nd, cells, on_progress))
    if kind == "ivf_flat":
        index = faiss.IndexIVFScalarQuantizer(coarse, d, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2, False)
    elif _code_parts(d) * LARGEST_PART >= d:
        index = faiss.IndexIVFPQ(coarse, d, cells, _code_parts(d), 8)
        index.pq.cp.min_points_per_centroid = 1  # else FAISS warns once for each part of a key
    else:  # a hidden size that does not divide: a byte a number instead
        index = faiss.IndexIVFScalarQuantizer(coarse, d, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2, False)
    index.train(keys_Nd)
    return index


def set_effort(index: Any, kind: IndexKind, effort: int) -> None:
    """Say how hard an index searches: cells that are looked into, or candidates that are kept in a graph."""
    if kind in WITH_CELLS:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", effort)
    else:
        index.hnsw.efSearch = effort


def first_effort(kind: IndexKind) -> int:
    """Return the least effort that is tried."""
    return 2 if kind in WITH_CELLS else 64


def most_effort(kind: IndexKind, cells: int, entries: int) -> int:
    """Return the effort beyond which an index finds nothing more."""
    return cells if kind in WITH_CELLS else entries


def candidates(kind: IndexKind, wanted: int) -> int:
    """Return how many keys an index is to propose for so many neighbours."""
    return REFINED * wanted if kind == "ivf_pq" else wanted + SPARE_CANDIDATES


def write_index(index: Any, path: Path) -> None:
    """Write an index whole or not at all; raises DatastoreError where it cannot be."""
    try:
        with replacing(path) as temporary:
            faiss.write_index(index, str(temporary))
    except (OSError, RuntimeError) as error:
        raise DatastoreError(f"{path} could not be written: {reason(error)}; free some space and try again") from None


def read_index(path: Path, record: IndexRecord, hidden_size: int, frugal: bool = False) -> Any:
    """Read an index; raises DatastoreError where it cannot be, or is not the one that is recorded.

    Args: frugal: without the tables that speed up an ivf_pq, 1 kB for each cell and byte of a code.
    """
    try:
        if path.is_symlink():
            raise RuntimeError("it is a link")
        _allow_no_more_than(path.stat().st_size)
        index = faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        if (index.d, index.ntotal) != (hidden_size, record.entries) or not _is_plain(index, record.kind):
            raise RuntimeError("it is another index than was recorded")
        if isinstance(index, faiss.IndexIVFPQ) and not frugal:
            index.use_precomputed_table = 0  # FAISS decides, now that the file is known to be what it should be
            index.precompute_table()
        return index
    except (OSError, RuntimeError, MemoryError) as error:
        raise DatastoreError(f"{path} cannot be read: {reason(error)}; make it again with mbpa-memory index") from None


def _allow_no_more_than(size: int) -> None:
    """Have FAISS refuse a file that claims to hold more than it does, before it makes room for that."""
    for limit in ("set_deserialization_vector_byte_limit", "set_deserialization_loop_limit"):
        if hasattr(faiss, limit):  # older versions have none
            getattr(faiss, limit)(size)


def _is_plain(index: Any, kind: IndexKind) -> bool:
    """Say whether an index is of the kind, and lies in memory and nowhere else."""
    if kind in WITH_CELLS:
        lists: Any = faiss.downcast_InvertedLists(index.invlists) if isinstance(index, faiss.IndexIVF) else None  # type: ignore[arg-type]
        return isinstance(lists, faiss.ArrayInvertedLists)
    return isinstance(index, faiss.IndexHNSW)


def check_available(kind: IndexKind | None, gpus: Gpus) -> None:
    """Raise DatastoreError where what is asked for is not there on this machine, before anything is read for it."""
    if kind == "cagra" and not (hasattr(faiss, "GpuIndexCagra") and has_gpu_build()):
        raise DatastoreError("index cagra needs a GPU and a FAISS that is built with cuVS; take hnsw or ivf_flat")
    if gpus != "none" and not has_gpu_build():
        raise DatastoreError(f"memory.gpus is {gpus}, but FAISS sees no GPU here; leave it out")


def check_gpus(kind: IndexKind, gpus: Gpus) -> None:
    """Raise DatastoreError where GPUs are asked for and FAISS searches the kind on a CPU only."""
    if gpus != "none" and kind == "hnsw":
        raise DatastoreError(
            "hnsw is searched on the CPU; leave memory.gpus out, or make another index with mbpa-memory index --kind ivf_flat"
        )


def to_gpus(index: Any, gpus: Gpus) -> Any:
    """Return the index on all GPUs: a copy on each, or a part on each.

    Raises DatastoreError where FAISS has no such index for GPUs (codes of 50 bytes, for example).
    """
    if gpus == "none":
        return index
    check_available(None, gpus)
    options = faiss.GpuMultipleClonerOptions()
    options.shard = gpus == "shard" and faiss.get_num_gpus() > 1  # FAISS does not come back from one part of an ivf_pq
    options.useFloat16 = True
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        raise DatastoreError(
            f"FAISS cannot put this index on GPUs ({reason(error)}); leave memory.gpus out, or make another index with "
            f"mbpa-memory index --kind ivf_flat"
        ) from None


def _centroids(keys_Nd: np.ndarray, cells: int, on_progress: Callable[[int], None]) -> np.ndarray:
    clustering = faiss.Kmeans(keys_Nd.shape[1], cells, niter=1, seed=1, min_points_per_centroid=1)
    for step in range(CLUSTERING_STEPS):  # one at a time, to say how far it is
        clustering.train(keys_Nd, init_centroids=clustering.centroids)
        on_progress(step + 1)
    return np.asarray(clustering.centroids)


def _code_parts(d: int) -> int:
    """Return the most parts, one byte each, that divide a key."""
    return max(parts for parts in range(1, min(d, CODE_BYTES) + 1) if d % parts == 0)


def _cagra(keys_Nd: np.ndarray) -> Any:
    check_available("cagra", "none")
    on_gpu = faiss.GpuIndexCagra(faiss.StandardGpuResources(), keys_Nd.shape[1], faiss.METRIC_L2)  # type: ignore[attr-defined]
    on_gpu.train(keys_Nd)
    index = faiss.IndexHNSWCagra()  # type: ignore[attr-defined]
    index.base_level_only = False
    on_gpu.copyTo(index)
    return index
