"""What memories of other sizes take, from what one was measured to take: bytes, queries a second, money.

    python benchmarks/memory.py --memory FOLDER --queries FOLDER --output runs/memory_real.json
    python benchmarks/sizing.py --measured runs/memory_real.json --output runs/sizing.json

Bytes follow from the layout of an entry. There are 4 sqrt(N) cells, so that a query that looks into as many of them as were
measured meets entries in proportion to sqrt(N): its time is the measured one times sqrt(N / N0) times the bytes of an entry in
the index over those that were measured. Prices are assumptions, of a GiB of memory with the cores that come with it, and of a
GB of disk, both for a month: give your own.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mbpa_lm.memory.datastore.entry_files import columns
from mbpa_lm.memory.datastore.index import choose_kind, index_bytes
from mbpa_lm.memory.datastore.manifest import Layout

TEXTS = (
    ("Penn Treebank, training", 929_588, 400),
    ("WikiText-2, training", 2_088_627, 400),
    ("WikiText-103, training", 103_000_000, 1024),
    ("a billion tokens", 1_000_000_000, 1024),
    ("a trillion tokens", 1_000_000_000_000, 1024),
)
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Measured:
    """One memory on one core, and the prices of a month."""

    entries: int
    d: int
    microseconds_a_query: float
    memory_price: float  # USD a GiB
    disk_price: float  # USD a GB


@dataclass(frozen=True)
class Size:
    """What a memory takes."""

    text: str
    entries: int
    d: int
    index: str
    disk_bytes: int  # beside the index
    memory_bytes: int
    machines: int  # of 512 GiB, each holding a part and asked by every query
    queries_a_second_and_core: float
    usd_a_month: float
    usd_a_month_compact: float  # with keys in the index alone


def size_of(text: str, entries: int, d: int, measured: Measured) -> Size:
    layout = Layout(d)
    kind = choose_kind(entries, layout)
    of_columns = columns(layout)
    on_disk = entries * sum(column.row_bytes for column in of_columns.values())
    in_memory = index_bytes(kind, entries, layout)
    machines = math.ceil(in_memory / (512 << 30))
    met = math.sqrt(entries / machines / measured.entries)  # by a query, on each machine, of those that were met when measured
    of_index = index_bytes(kind, 1, layout) / index_bytes("ivf_flat", 1, Layout(measured.d))
    seconds = measured.microseconds_a_query * 1e-6 * met * of_index
    memory_usd = in_memory / (1 << 30) * measured.memory_price
    disk_usd = (on_disk + in_memory) / 1e9 * measured.disk_price
    keys_usd = entries * of_columns["keys"].row_bytes / 1e9 * measured.disk_price
    costs = (memory_usd + disk_usd, memory_usd + disk_usd - keys_usd)
    return Size(text, entries, d, kind, on_disk, in_memory, machines, 1 / seconds, *costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measured", type=Path, required=True, help="what benchmarks/memory.py wrote of a memory with ivf_flat"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--memory-price", type=float, default=5.0, help="USD a GiB and month (default: 5)")
    parser.add_argument("--disk-price", type=float, default=0.1, help="USD a GB and month (default: 0.10)")
    arguments = parser.parse_args()
    row = json.loads(arguments.measured.read_text())["rows"][0]
    measured = Measured(row["keys"], row["d"], row["many"], arguments.memory_price, arguments.disk_price)
    sizes = [size_of(*text, measured) for text in TEXTS]
    arguments.output.write_text(json.dumps({"measured": asdict(measured), "sizes": [asdict(size) for size in sizes]}, indent=1))
    table = Table("text", "entries", "d", "index", "disk GB", "index GB", "machines", "queries/s, core", "USD/month", "compact")
    for size in sizes:
        gigabytes = [f"{count / 1e9:,.2f}" for count in (size.disk_bytes, size.memory_bytes)]
        costs = [f"{cost:,.2f}" for cost in (size.usd_a_month, size.usd_a_month_compact)]
        speed = f"{size.queries_a_second_and_core:,.0f}"
        table.add_row(size.text, f"{size.entries:,}", str(size.d), size.index, *gigabytes, str(size.machines), speed, *costs)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
