"""Fuzz the parsers with atheris: python -m tests.fuzz [--target NAME ...] [--runs N] [--output FILE.json]

Each target runs in a process of its own, which must end by itself: a crash, another error than the package's own, 20 seconds
over one input or more than 4 GB of memory ends it otherwise, and the input is kept in the folder that is named.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPILED = (
    "adaptation.likely_words",
    "adaptation.products",
    "adaptation.slow_weights",
    "adaptation.steps",
    "adaptation.words",
    "experts.cache",
    "memory.datastore.measuring_compiled",
    "memory.nearest",
    "mixing.gate",
    "numerics.largest",
)

NAMES = (
    "pointers",
    "checkpoint",
    "weights",
    "words",
    "sentencepiece",
    "tokens",
    "datastore",
    "index",
    "tuned",
    "config",
    "text",
    "state",
    "scales",
    "huggingface",
    "settings",
    "entries",
    "runs",
)


def fuzz(name: str, runs: int, folder: Path) -> None:
    """Fuzz one target; does not return."""
    import atheris

    for name_of_module in COMPILED:  # a compiled loop cannot be instrumented, so it is imported before
        importlib.import_module(f"mbpa_lm.{name_of_module}")
    with atheris.instrument_imports(include=["mbpa_lm"]):
        from tests.fuzz.targets import prepared
    read = prepared(name, folder / "work")
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(3):
        (corpus / f"seed{number}").write_bytes(bytes([number, 5, 9, 12, 30, 7, 3, 77, 1]))
    options = [f"-runs={runs}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=512", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], read)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        fuzz(arguments.target[0], arguments.runs, arguments.in_process)
    shared = Path("/dev/shm")
    rows = []
    for name in arguments.target:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=shared if shared.is_dir() else None))
        command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--runs", str(arguments.runs), "--in-process", folder]
        started = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        seconds = time.perf_counter() - started
        done = re.search(r"number_of_executed_units: (\d+)", ended.stderr)
        rows.append({"target": name, "executions": int(done[1]) if done else 0, "seconds": seconds, "exit": ended.returncode})
        print(f"{name:14} {rows[-1]['executions']:>12,} executions {seconds:8.0f} s  exit {ended.returncode}", flush=True)
        if ended.returncode:
            print(ended.stdout[-3000:], ended.stderr[-1500:], f"\nthe input is in {folder}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1))
    return int(any(row["exit"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
