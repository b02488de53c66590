"""What memories cost to build and to search, by size and kind, beside plain calls of FAISS on the same keys.

    python benchmarks/memory.py --output runs/memory.json            # 10k, 100k, 1M keys; d 64 and 400
    python benchmarks/memory.py --large --output runs/memory.json    # 10M keys of d 64 too (4 GB of disk)
    python benchmarks/memory.py --quick --output runs/memory.json    # 10k keys of d 64
    python benchmarks/memory.py --memory FOLDER --queries FOLDER --output runs/memory.json    # real ones, of mbpa-memory

Random keys are noisy copies of one of 300 to 30,000 contexts. Each row runs in a process of its own. "one" and "many" are
microseconds a query, asked alone and 256 at once, for 32 neighbours with their keys, words and log-partitions. "by hand" is a
bare search of the very same index and the NumPy lines that fetch the same from arrays in memory, which is what a user would
write instead. "rows" is our search for row numbers only; "faiss" is the bare search, or `faiss.knn` where there is no index,
which gives no more than that, and "overhead" what "rows" takes more than it. "exact" is `faiss.knn` over all keys in single
precision, and recall is against it. Resident memory is that of the process, of which about 300 MB are Python, PyTorch and
FAISS. Milvus Lite is there for its interface, not for its speed.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.index import candidates
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.system.machine import describe_machine, keep_freed_memory, resident_bytes

K, QUERIES, WRITTEN_AT_ONCE = 32, 256, 1 << 16
TIMES = ("one", "faiss one", "many", "by hand", "rows", "faiss", "exact")
Row = dict[str, Any]


def median_seconds(*calls: Callable[[], object], seconds: float = 1.0) -> list[float]:
    """Return the median time of each call; they take turns, so that what disturbs one disturbs all."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    while min(map(sum, times)) < seconds or len(times[0]) < 3:
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            of_call.append(time.perf_counter() - start)
    return [float(np.median(of_call)) for of_call in times]


class Keys:
    """Keys by their numbers, and queries near some of them."""

    def __init__(self, count: int, d: int) -> None:
        self.count, self.d = count, d
        self._contexts = torch.randn(max(300, count // 300), d, generator=torch.Generator().manual_seed(1))

    def between(self, begin: int, end: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(begin)
        contexts = self._contexts[torch.randint(0, len(self._contexts), (end - begin,), generator=generator)]
        return (contexts + 0.5 * torch.randn(end - begin, self.d, generator=generator)).half().float()

    def all(self) -> np.ndarray:
        found = np.empty((self.count, self.d), np.float32)
        for begin in range(0, self.count, WRITTEN_AT_ONCE):
            end = min(begin + WRITTEN_AT_ONCE, self.count)
            found[begin:end] = self.between(begin, end).numpy()
        return found

    def queries(self) -> torch.Tensor:
        first = self.count // 2 // WRITTEN_AT_ONCE * WRITTEN_AT_ONCE
        near = self.between(first, min(first + WRITTEN_AT_ONCE, self.count))
        chosen = near[torch.linspace(0, len(near) - 1, QUERIES).long()]
        spread = near.std(0)
        return chosen + 0.3 * spread * torch.randn(QUERIES, self.d, generator=torch.Generator().manual_seed(2))


def entries_of(keys: torch.Tensor) -> Entries:
    count = len(keys)
    return Entries(keys, torch.arange(count), torch.zeros(count), torch.zeros(count, 0).int(), torch.zeros(count, 0))


def measure_datastore(keys: Keys, kind: str, folder: Path) -> Row:
    store = Datastore.create(folder / "memory", Identity("benchmark", "benchmark"), Layout(keys.d))
    start = time.perf_counter()
    for begin in range(0, keys.count, WRITTEN_AT_ONCE):
        store.add(entries_of(keys.between(begin, min(begin + WRITTEN_AT_ONCE, keys.count))))
    written = time.perf_counter()
    store.build_index(None if kind == "auto" else kind)  # type: ignore[arg-type]
    built = time.perf_counter()
    size = sum(file.stat().st_size for file in (folder / "memory").iterdir())
    built_at = {
        "entries_per_second_written": keys.count / (written - start),
        "seconds_indexing": built - written,
        "build": keys.count / (built - start),
    }
    return {**built_at, "disk": size, **measure_search(store, keys.queries(), keys.all)}


def measure_existing(folder: Path, of_queries: Path) -> Row:
    """Search a memory for the keys of another one, of a text that it has not read."""
    store, others = Datastore.open(folder), Datastore.open(of_queries)
    rows = np.linspace(0, len(others) - 1, QUERIES).astype(np.int64)
    queries = torch.stack([others.column_between("keys", row, row + 1)[0].float() for row in rows.tolist()])
    size = sum(file.stat().st_size for file in folder.iterdir())

    def everything() -> np.ndarray:
        return np.asarray(store.column_between("keys", 0, len(store)).float().numpy())

    return {"disk": size, **measure_search(store, queries, everything)}


def measure_search(store: Datastore, queries: torch.Tensor, all_keys: Callable[[], np.ndarray]) -> Row:
    record = store.manifest.index
    found = store.search(queries, K).positions.numpy()
    resident = resident_bytes()
    everything, asked = all_keys(), queries.numpy()
    start_exact = time.perf_counter()
    expected = faiss.knn(asked, everything, K)[1]
    exact = (time.perf_counter() - start_exact) / QUERIES
    wanted = K + 8 if record is None else candidates(record.kind, K)

    def bare(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray]
        found = faiss.knn(of, everything, wanted) if store._index is None else store._index.searched.search(of, wanted)
        return found

    half, values = everything.astype(np.float16), np.arange(len(store))
    log_partitions = np.zeros(len(store), np.float32)

    def by_hand() -> object:
        rows = bare(asked)[1]
        measured = np.square(half[rows].astype(np.float32) - asked[:, None]).sum(-1)
        nearest = np.take_along_axis(rows, measured.argsort(axis=1)[:, :K], axis=1)
        return half[nearest], values[nearest], log_partitions[nearest]

    one, bare_one = median_seconds(lambda: store.search(queries[:1], K), lambda: bare(asked[:1]))
    ways = (lambda: store.search(queries, K), lambda: store.candidates(queries, K), lambda: bare(asked), by_hand)
    many, rows_only, bare_many, hand = median_seconds(*ways)
    return {
        "kind": "flat" if record is None else f"{record.kind}, effort {record.search['effort']} of {record.search['cells']}",
        "resident": resident,
        "one": one * 1e6,
        "faiss one": bare_one * 1e6,
        "many": many / QUERIES * 1e6,
        "rows": rows_only / QUERIES * 1e6,
        "faiss": bare_many / QUERIES * 1e6,
        "by hand": hand / QUERIES * 1e6,
        "exact": exact * 1e6,
        "recall": float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, expected, strict=True)])),
    }


def measure_window(keys: Keys) -> Row:
    memory = WindowMemory(keys.count, keys.d, 0, torch.float32, torch.device("cpu"))
    everything = torch.from_numpy(keys.all())
    start = time.perf_counter()
    for begin in range(0, keys.count, 4096):
        memory.write(entries_of(everything[begin : begin + 4096]))
    built = time.perf_counter()
    queries = entries_of(keys.queries())
    asked, array, first = queries.keys.numpy(), everything.numpy(), queries.rows(slice(0, 1))
    nothing = torch.zeros(QUERIES, dtype=torch.bool)  # is stored: or copies of one query would soon be all that is near

    def search(entries: Entries) -> object:
        return memory.read_and_write(entries, K, stored=nothing[: len(entries.values)])

    one, bare_one = median_seconds(lambda: search(first), lambda: faiss.knn(asked[:1], array, K))
    many, exact = median_seconds(lambda: search(queries), lambda: faiss.knn(asked, array, K))
    return {
        "kind": "window",
        "build": keys.count / (built - start),
        "disk": 0,
        "resident": resident_bytes(),
        "one": one * 1e6,
        "faiss one": bare_one * 1e6,
        "many": many / QUERIES * 1e6,
        "faiss": exact / QUERIES * 1e6,
        "exact": exact / QUERIES * 1e6,
        "recall": 1.0,
    }


def measure_milvus_lite(keys: Keys, folder: Path) -> Row:
    from mbpa_lm.memory.remote.settings import RemoteSettings
    from mbpa_lm.memory.remote.store import RemoteStore

    layout, everything = Layout(keys.d, key_type="float32"), keys.all()
    with RemoteStore(RemoteSettings(str(folder / "memory.db")), Identity("benchmark", "benchmark"), layout) as store:
        start = time.perf_counter()
        store.add(entries_of(torch.from_numpy(everything)))
        store.flush()
        built = time.perf_counter()
        queries = keys.queries()
        one, many = median_seconds(lambda: store.search(queries[:1], K), lambda: store.search(queries, K))
        exact = median_seconds(lambda: faiss.knn(queries.numpy(), everything, K))[0]
    return {
        "kind": "Milvus Lite",
        "build": keys.count / (built - start),
        "disk": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "resident": resident_bytes(),
        "one": one * 1e6,
        "many": many / QUERIES * 1e6,
        "exact": exact / QUERIES * 1e6,
        "recall": 1.0,
    }


def measure(backend: str, count: int, d: int, folder: str, results: Any) -> None:
    keep_freed_memory()  # as evaluate.py does
    keys = Keys(count, d)
    if backend == "window":
        row = measure_window(keys)
    elif backend == "milvus":
        row = measure_milvus_lite(keys, Path(folder))
    else:
        row = measure_datastore(keys, backend, Path(folder))
    results.put({"backend": backend, "keys": count, "d": d, **row})


def configurations(arguments: argparse.Namespace) -> list[tuple[str, int, int]]:
    if arguments.quick:
        return [(backend, 10_000, 64) for backend in ("window", "flat", "hnsw")]
    found = [
        (backend, count, d) for d in (64, 400) for count in (10_000, 100_000) for backend in ("window", "flat", "auto", "hnsw")
    ]
    found += [("milvus", 10_000, 64), ("milvus", 10_000, 400)]
    found += [("auto", 1_000_000, 64), ("ivf_pq", 1_000_000, 64), ("auto", 1_000_000, 400)]
    return [*found, *([("auto", 10_000_000, 64)] if arguments.large else [])]


def save(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), "rows": rows}, indent=1))
    table = Table("memory", "keys", "d", "built/s", "disk MB", "resident MB", *TIMES, "overhead", "recall")
    for row in rows:
        sizes = [f"{row.get('build', 0):,.0f}", f"{row['disk'] / 1e6:,.0f}", f"{row['resident'] / 1e6:,.0f}"]
        times = [f"{row[name]:,.0f}" if name in row else "" for name in TIMES]
        overhead = f"{row.get('rows', row['many']) / row['faiss'] - 1:+.0%}" if "faiss" in row else ""
        table.add_row(row["kind"], f"{row['keys']:,}", str(row["d"]), *sizes, *times, overhead, f"{row['recall']:.1%}")
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", help="one kind of memory: window, flat, auto, hnsw, ivf_pq or milvus")
    parser.add_argument("--keys", type=int, help="memories of so many keys only")
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--folder", type=Path, help="where the memories are written; a temporary folder where it is left out")
    arguments = parser.parse_args()
    if arguments.memory:
        row = measure_existing(arguments.memory, arguments.queries)
        count, d = len(Datastore.open(arguments.memory)), Datastore.open(arguments.memory).manifest.layout.hidden_size
        save([{"backend": "existing", "keys": count, "d": d, **row}], arguments.output)
        return
    context, rows = multiprocessing.get_context("spawn"), []
    rows_to_be = configurations(arguments)
    chosen = [row for row in rows_to_be if arguments.only in (None, row[0]) and arguments.keys in (None, row[1])]
    for backend, count, d in chosen:
        folder = tempfile.mkdtemp(dir=arguments.folder)
        results = context.Queue()
        process = context.Process(target=measure, args=(backend, count, d, folder, results))
        process.start()
        rows.append(results.get())
        process.join()
        shutil.rmtree(folder)
        save(rows, arguments.output)


if __name__ == "__main__":
    main()
