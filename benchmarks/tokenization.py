"""Text to a memory-mapped token file: time and memory as the text grows, beside reading it whole.

    python benchmarks/tokenization.py --output runs/tokenization.json            # 1, 10 and 100 million tokens
    python benchmarks/tokenization.py --quick --output runs/tokenization.json    # 0.2 and 2 million

The text is generated: words of a Zipf distribution over 100,000, 25 a line. "whole file" is what most research code does
(awd-lstm-lm's `Corpus`): split every line, look every word up, one list of ids. Each measurement runs in a process of its own.
Memory is anonymous memory beyond that of the imported libraries, at its highest; mapped files are not counted, as the system
takes their pages back when it needs them.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mbpa_lm.config import DataConfig
from mbpa_lm.data.corpora import open_corpus
from mbpa_lm.data.streams import count_tokens, open_stream
from mbpa_lm.data.tokenizers import WordTokenizer
from mbpa_lm.system.machine import describe_machine

WORDS_A_LINE = 25
LARGEST_WHOLE_FILE = 10_000_000
"""Tokens above which reading the whole file would not fit this benchmark's machine."""


def generate(folder: Path, tokens: int) -> None:
    """Write a corpus folder whose training text has `tokens` tokens, line ends included."""
    generator = np.random.default_rng(0)
    words = np.array([f"w{index:x}" for index in range(100_000)])
    probabilities = 1 / np.arange(1, len(words) + 1)
    probabilities /= probabilities.sum()
    lines = tokens // (WORDS_A_LINE + 1)
    with (folder / "train.txt").open("w") as file:
        for start in range(0, lines, 100_000):
            count = min(100_000, lines - start)
            for row in words[generator.choice(len(words), size=(count, WORDS_A_LINE), p=probabilities)]:
                file.write(" ".join(row) + "\n")
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text("w1 w2\n")


def token_file(folder: Path) -> int:
    corpus = open_corpus(DataConfig(corpus="text", path=str(folder)))
    tokenizer = WordTokenizer.train(corpus.pieces("train"), 1, 0)
    stream = open_stream(corpus, "train", tokenizer, folder / "tokens")
    count_tokens(stream.tokens, tokenizer.vocabulary_size)
    return len(stream)


def whole_file(folder: Path) -> int:
    index: dict[str, int] = {}
    ids = []
    for line in (folder / "train.txt").read_text().splitlines():
        for word in [*line.split(), "<eos>"]:
            ids.append(index.setdefault(word, len(index)))
    return len(torch.tensor(ids))


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark reads /proc, which only Linux has")


def measure(method: Callable[[Path], int], folder: Path) -> dict[str, float]:
    """Run `method`, watching this process's memory, and return its tokens, seconds and bytes."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    tokens = method(folder)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"tokens": tokens, "seconds": seconds, "bytes": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the text")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    arguments = parser.parse_args()
    sizes = (200_000, 2_000_000) if arguments.quick else (1_000_000, 10_000_000, 100_000_000)
    context = multiprocessing.get_context("spawn")
    rows = []
    table = Table(title="word-level tokenization of generated text")
    for name in ("method", "tokens", "seconds", "tokens/s", "memory MB"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), size)
            for name, method in (("token file", token_file), ("whole file", whole_file)):
                if method is whole_file and size > LARGEST_WHOLE_FILE:
                    continue
                with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
                    row: dict[str, Any] = {"method": name, **process.submit(measure, method, Path(folder)).result()}
                rows.append(row)
                rate, memory = row["tokens"] / row["seconds"], row["bytes"] / 1e6
                table.add_row(name, f"{row['tokens']:,}", f"{row['seconds']:.1f}", f"{rate:,.0f}", f"{memory:,.0f}")
    Console().print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
