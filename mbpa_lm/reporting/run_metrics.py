"""What metrics.json says of an evaluation, and what of it goes to the log.

docs/evaluation.md explains the numbers.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mbpa_lm.checkpoints.checkpoint import Checkpoint, training_record
from mbpa_lm.config import Config
from mbpa_lm.data.streams import TokenStream
from mbpa_lm.numerics.perplexities import perplexity
from mbpa_lm.reporting.metrics import SEGMENTS, Targets, summarize
from mbpa_lm.reporting.remarks import unknown_shares
from mbpa_lm.reporting.tracking import RunLog
from mbpa_lm.scoring.documents import Scored
from mbpa_lm.scoring.mixed_scores import UNIFORM, MixedScores
from mbpa_lm.system.machine import code_commit, describe_machine, peak_gpu_memory_bytes, peak_memory_bytes


def run_metrics(
    config: Config,
    checkpoint: Checkpoint,
    stream: TokenStream,
    streams: Sequence[TokenStream],
    scored: Scored,
) -> dict[str, Any]:
    """Return the report of `stream`, scored as one or as several `streams`."""
    counts, scores, details = checkpoint.token_counts.numpy(), scored.scores, scored.details
    targets = Targets.joined([Targets.of(part, counts) for part in streams])
    experts = {}
    for name, losses in scores.losses.items():
        seconds = scores.seconds[name]
        speed = {"seconds": seconds, "tokens_per_second": len(losses) / seconds}
        experts[name] = {**summarize(losses, targets), **speed, **details.get(name, {})}
    return {
        "experts": experts,
        "stream": {
            "name": stream.name,
            "tokens": len(stream),
            "scored": sum(len(part) - 1 for part in streams),
            "words": targets.words,
            "characters": targets.characters,
            "documents": len(stream.document_starts),
            **unknown_shares(checkpoint.tokenizer.unknown, stream.tokens, counts),
        },
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
        "checkpoint": {
            "folder": str(checkpoint.folder),
            "fingerprint": checkpoint.fingerprint,
            "trained": training_record(checkpoint.folder),
        },
        "parameters": sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        "seconds": sum(scores.part_seconds.values()),
        "command": shlex.join(sys.argv),
        "commit": code_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(checkpoint.model.output_layer().weight.device),
        "config": asdict(config),
    }


def gate_metrics(mixed: MixedScores, experts: Sequence[str]) -> dict[str, Any]:
    """Return the gate's mean weights, and along the stream, and what it would be without each expert."""
    names = [*experts, UNIFORM]
    along = np.stack([part.mean(axis=0) for part in np.array_split(mixed.gate_weights, SEGMENTS) if len(part)])
    return {
        "weights": dict(zip(names, mixed.gate_weights.mean(axis=0).tolist(), strict=True)),
        "weights_along_stream": dict(zip(names, along.T.tolist(), strict=True)),
        "best_fixed_weights_in_hindsight": {"nats_per_token": mixed.best_fixed, "perplexity": perplexity(mixed.best_fixed)},
        "with_a_noise_expert": {"nats_per_token": mixed.with_noise, "perplexity": perplexity(mixed.with_noise)},
        "without": {name: {"nats_per_token": loss, "perplexity": perplexity(loss)} for name, loss in mixed.without.items()},
    }


def log_metrics(log: RunLog, metrics: dict[str, Any]) -> None:
    shown = ("perplexity", "bits_per_token", "bits_per_word", "bits_per_character", "tokens_per_second")
    final = {f"{name}/{key}": values[key] for name, values in metrics["experts"].items() for key in shown}
    curves = {name: values["along_stream"] for name, values in metrics["experts"].items()}
    for segment in range(len(curves["base"])):
        log.write({"step": segment, **{f"stream/{name}": parts[segment]["perplexity"] for name, parts in curves.items()}})
    experts = metrics["experts"]
    rows = [[name, *(values[key] for key in shown)] for name, values in experts.items()]
    log.show_table("experts", ["expert", *shown], rows)
    for measure in (name for name in experts["base"] if name.startswith("by_")):
        groups = list(experts["base"][measure])
        perplexities = [[name, *(values[measure][group]["perplexity"] for group in groups)] for name, values in experts.items()]
        log.show_table(measure, ["expert", *groups], perplexities)
    log.summarize(final)
