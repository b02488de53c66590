"""The results of an evaluation: metrics.json, the loss of every token, and a table on the terminal."""

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from safetensors import SafetensorError

from mbpa_lm.checkpoints.tuned import Tuned
from mbpa_lm.errors import RunFolderError, reason
from mbpa_lm.reporting.remarks import of_unknown_words
from mbpa_lm.scoring.stream import StreamScores
from mbpa_lm.system.durable import file_hash, replacing, write_json
from mbpa_lm.system.progress import console, counted
from mbpa_lm.system.tensor_files import save_tensors

METRICS_FILE = "metrics.json"
LARGE = 1e6
LOSSES_FILE = "losses.safetensors"


def write_results(folder: Path, metrics: Mapping[str, Any], scores: StreamScores) -> Path:
    """Write metrics.json and losses.safetensors into the run folder, both or neither.

    Where the process is killed between the two, the losses are not those whose hash is in metrics.json.
    """
    path, losses_path, earlier = (folder / name for name in (METRICS_FILE, LOSSES_FILE, f".{LOSSES_FILE}.earlier"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        losses = {name: torch.from_numpy(values) for name, values in scores.losses.items()}
        earlier.unlink(missing_ok=True)
        if losses_path.is_file():
            os.link(losses_path, earlier)
        with replacing(path) as metrics_written, replacing(losses_path) as losses_written:
            save_tensors(losses, losses_written)
            write_json(metrics_written, {**metrics, "losses_sha256": file_hash(losses_written)})
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            os.replace(earlier, losses_path)  # which does nothing where they are one file
        raise RunFolderError(f"results could not be written to {folder}: {reason(error)}; earlier ones are untouched") from None
    finally:
        with contextlib.suppress(OSError):
            earlier.unlink(missing_ok=True)
    return path


def print_tables(metrics: Mapping[str, Any]) -> None:
    """Print the experts side by side, then where their losses differ."""
    experts = metrics["experts"]
    base = experts["base"]["perplexity"]
    stream = metrics["stream"]
    title = f"{stream['name']}: {counted(stream['scored'], 'token')} scored of {stream['tokens']:,}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("expert", no_wrap=True)
    by_word = any(values["bits_per_word"] != values["bits_per_token"] for values in experts.values())
    bits = ["bits_per_word" if by_word else "bits_per_token", "bits_per_character"]
    for heading in ("perplexity", "vs base", *(name.replace("_per_", "/").removesuffix("acter") for name in bits), "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, values in experts.items():
        table.add_row(
            name,
            _perplexity(values["perplexity"]),
            "" if name == "base" else _change(values["perplexity"], base),
            *(f"{values[measure]:.3f}" for measure in bits),
            f"{values['tokens_per_second']:,.0f}",
        )
    console.print(table)
    unknown = of_unknown_words(stream)
    if unknown:
        console.print(unknown, markup=False)
    _print_groups("perplexity by occurrences of the word in training", experts, "by_training_frequency")
    _print_groups("perplexity by occurrence in the stream", experts, "by_recurrence")
    _print_groups("perplexity by positions since the word last occurred", experts, "by_distance")
    if stream["documents"] > 1:
        _print_groups("perplexity by position in the document", experts, "by_document_position")
    if "gate" in metrics:
        _print_gate(metrics["gate"], experts["gate"]["perplexity"])
    gpu = metrics["peak_gpu_memory_bytes"]
    console.print(f"peak memory {metrics['peak_memory_bytes'] / 1e6:,.0f} MB{f', GPU {gpu / 1e6:,.0f} MB' if gpu else ''}")


def print_tuned(tuned: Tuned) -> None:
    """Print what tuning gave on the validation text, of the adaptation on a part of it that nothing was fitted on."""
    table = Table(title=f"perplexity on {tuned.stream}, the part tuned on", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("expert")
    columns = ("base", "configured", "best grid point", "tuned")
    for column in columns:
        table.add_column(column, justify="right")
    for name, losses in tuned.losses.items():
        table.add_row(name, *(f"{math.exp(losses[column]):.2f}" if column in losses else "" for column in columns))
    console.print(table)


def _print_groups(title: str, experts: Mapping[str, Any], group: str) -> None:
    """Print the base model's perplexity by group, and the change of every other expert."""
    base = {row: values for row, values in experts["base"][group].items() if values["tokens"]}
    table = Table(title=f"{title}; of the others, change against base", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("expert", no_wrap=True)
    for row, values in base.items():
        label = re.sub(r"(?<=\d)-(?=\d)", "-\n", row)  # a range of large numbers is wider than what stands below it
        table.add_column(f"{label}\n({values['tokens']:,})", justify="right")
    table.add_row("base", *(f"{values['perplexity']:,.1f}" for values in base.values()))
    for name, values in experts.items():
        if name != "base":
            table.add_row(name, *(_change(values[group][row]["perplexity"], base[row]["perplexity"]) for row in base))
    if base:
        console.print(table)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < LARGE else f"{value:.1e}"


def _change(value: float, base: float) -> str:
    """Return how much more a perplexity is than another, in per cent, as long as that says something."""
    change = round(value / base - 1, 3) + 0.0  # no minus before a zero
    return f"{change:+.1%}" if change < LARGE / 1e4 else f"{value / base:.0e} times"


def _print_gate(gate: Mapping[str, Any], whole: float) -> None:
    table = Table(title="the gate: mean weights, and its perplexity without an expert", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("expert", no_wrap=True)
    for heading in ("weight", "without it", "costs"):
        table.add_column(heading, justify="right")
    for name in [*gate["weights"], *(name for name in gate["without"] if name not in gate["weights"])]:
        weight = f"{gate['weights'][name]:.3f}" if name in gate["weights"] else ""
        without = gate["without"].get(name)
        cells = [_perplexity(without["perplexity"]), _change(without["perplexity"], whole)] if without else ["", ""]
        table.add_row(name, weight, *cells)
    console.print(table)
    noisy = gate["with_a_noise_expert"]["perplexity"]
    console.print(f"with one more expert that predicts noise: {noisy:.2f} ({noisy / whole - 1:+.2%})")
    console.print(f"the best fixed weights, chosen in hindsight: {gate['best_fixed_weights_in_hindsight']['perplexity']:.2f}")
