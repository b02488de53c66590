"""A text of 100 million generated tokens through `train.py` and `evaluate.py`: is memory bounded, does the loader keep up?

    python benchmarks/long_text.py --output runs/long_text.json            # 100 million tokens, and 2 that are evaluated
    python benchmarks/long_text.py --quick --output runs/long_text.json    # 2 million

Words come from a Zipf distribution over 10,000. A small LSTM reads all of it once, in batches of 512 x 50, and is then
evaluated (`base` alone). Both are the commands that a user would type, in processes whose resident memory is read ten times a
second; it counts the pages of mapped token files that are in memory, though the system may take those back. "loader" reads
the same batches from the same token file with nothing else to do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mbpa_lm.data.streams import SequenceBatches
from mbpa_lm.system.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, WORDS_A_LINE, BATCH, LENGTH = 10_000, 25, 512, 50


def generate(path: Path, tokens: int, seed: int) -> None:
    """Write a text of so many tokens, line ends included."""
    generator = np.random.default_rng(seed)
    words = np.array([f"w{index:x}" for index in range(VOCABULARY)])
    weights = 1 / np.arange(1, VOCABULARY + 1)
    lines = tokens // (WORDS_A_LINE + 1)
    with path.open("w") as file:
        for start in range(0, lines, 50_000):
            rows = generator.choice(VOCABULARY, (min(50_000, lines - start), WORDS_A_LINE), p=weights / weights.sum())
            file.writelines(" ".join(row) + "\n" for row in words[rows])


def watched(command: list[str]) -> tuple[float, int]:
    """Run a command and return its seconds and the most resident memory that it was seen with."""
    started, highest = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
        highest = max(highest, *(int(kilobytes) * 1024 for kilobytes in resident)) if resident else highest
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, highest


def loader_speed(token_folder: Path) -> float:
    file = next(token_folder.glob("*-train-*/tokens.bin"))
    batches = SequenceBatches(np.memmap(file, dtype=np.uint16, mode="r"), BATCH, LENGTH)
    count, started = min(batches.steps, 3000), time.perf_counter()
    for _ in islice(batches.batches(0, 0), count):
        pass
    return count * BATCH * LENGTH / (time.perf_counter() - started)


def measure(tokens: int, folder: Path) -> dict[str, Any]:
    text, run = folder / "text", folder / "run"
    text.mkdir()
    for seed, (split, count) in enumerate({"train": tokens, "valid": 200_000, "test": tokens // 50}.items()):
        generate(text / f"{split}.txt", count, seed)
    options = ["--data.corpus", "text", "--data.path", str(text), "--data.token_folder", str(folder / "tokens")]
    options += ["--tracking.mode", "disabled", "--model.hidden_size", "32", "--model.layers", "1"]
    training = ["--training.batch_size", str(BATCH), "--training.sequence_length", str(LENGTH), "--training.epochs", "1"]
    training += ["--training.sampled_words", "128", "--run.folder", str(run)]
    seconds, resident = watched(["train.py", *options, *training])
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    speed = next(record["train/tokens_per_second"] for record in records if "epoch" in record)
    evaluation = ["--checkpoint", str(run), "--run.folder", str(folder / "scored"), "--evaluation.experts", "[base]"]
    evaluation_seconds, evaluation_resident = watched(["evaluate.py", *options, *evaluation])
    metrics = json.loads((folder / "scored" / "metrics.json").read_text())
    return {
        "tokens": tokens,
        "text_bytes": (text / "train.txt").stat().st_size,
        "train_seconds": seconds,
        "train_tokens_per_second": speed,
        "train_resident": resident,
        "loader_tokens_per_second": loader_speed(folder / "tokens"),
        "evaluated": metrics["stream"]["scored"],
        "evaluate_seconds": evaluation_seconds,
        "evaluate_resident": evaluation_resident,
        "perplexity": metrics["experts"]["base"]["perplexity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(2_000_000 if arguments.quick else 100_000_000, Path(folder))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), **row}, indent=1))
    table = Table("", "tokens", "minutes", "tokens/s", "resident MiB")
    train = [
        f"{row['train_seconds'] / 60:.1f}",
        f"{row['train_tokens_per_second']:,.0f}",
        f"{row['train_resident'] / 2**20:,.0f}",
    ]
    speed = row["evaluated"] / row["evaluate_seconds"]
    scored = [f"{row['evaluate_seconds'] / 60:.1f}", f"{speed:,.0f}", f"{row['evaluate_resident'] / 2**20:,.0f}"]
    table.add_row("train.py", f"{row['tokens']:,}", *train)
    table.add_row("evaluate.py", f"{row['evaluated']:,}", *scored)
    table.add_row("loader alone", "", "", f"{row['loader_tokens_per_second']:,.0f}", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
