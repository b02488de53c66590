"""Evaluation: a checkpoint and a held-out text in, metrics.json and a table out."""

import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mbpa_lm.checkpoint import Checkpoint, check_same_settings, find_checkpoint, load_checkpoint, training_record
from mbpa_lm.config import Config, RemoteConfig
from mbpa_lm.data.corpora import Corpus
from mbpa_lm.data.streams import TokenStream, open_stream
from mbpa_lm.data.text_files import WholeText
from mbpa_lm.datastores import knows
from mbpa_lm.errors import ConfigError, did_you_mean
from mbpa_lm.features import FEATURES
from mbpa_lm.figures import write_figures
from mbpa_lm.gate import GateRule, OnlineGate
from mbpa_lm.machine import code_commit, describe_machine, peak_gpu_memory_bytes, peak_memory_bytes, pick_device
from mbpa_lm.metrics import SEGMENTS, Targets, perplexity, summarize
from mbpa_lm.mixed_scores import UNIFORM, MixedScores, mixed_scores
from mbpa_lm.pretrained import pretrained_checkpoint
from mbpa_lm.progress import ProgressBar, console, token_progress
from mbpa_lm.report import print_tables, print_tuned, write_results
from mbpa_lm.resources import (
    chunk_length,
    fill_in_scales,
    make_experts,
    make_history,
    make_memory,
    make_slow_weights,
    own_corpus,
)
from mbpa_lm.scoring import StreamScores, score_stream
from mbpa_lm.tracking import RunLog
from mbpa_lm.tuned import Tuned, load_tuned, save_tuned
from mbpa_lm.tuning.everything import tune


def evaluate(config: Config, checkpoint_path: Path | None, tune_first: bool = False) -> dict[str, Any]:
    """Score a stream with every configured expert; write and return the metrics.

    Without a path, that is the model that `model.pretrained` names. With `tune_first`, the experts are tuned on the validation
    text before, and what is best is kept with the checkpoint. Raises CheckpointError where the checkpoint is not of the
    configured model, tokenizer or text, and DataError where the text cannot be read.
    """
    checkpoint = pretrained_checkpoint(config) if checkpoint_path is None else _load(config, checkpoint_path)
    stream, fingerprint = _open_stream(config, checkpoint)
    model = checkpoint.model
    if tune_first:
        _tune(fill_in_scales(config, checkpoint), checkpoint)
    tuned = load_tuned(checkpoint.folder, model.hidden_size) if config.evaluation.tuned else None
    if tuned is not None:
        config = tuned.apply(config)
        sections = ", ".join(tuned.settings)
        console.print(f"as tuned on {tuned.stream}: {sections}; --evaluation.tuned false takes the configured settings")
    config = fill_in_scales(config, checkpoint)
    experts = make_experts(config, checkpoint)
    names = [expert.name for expert in experts]
    _check_names(config, names)
    slow_weights = make_slow_weights(config, checkpoint, experts)
    metric = None if tuned is None else tuned.metric_tensor()
    _load_compiled_loops(config, checkpoint, stream, metric)
    log_of_run = RunLog(Path(config.run.folder), config.tracking, "evaluate", asdict(config))
    with ExitStack() as closing, log_of_run as log:
        memory = make_memory(config, checkpoint, metric, closing)
        remembered_before, read_by = len(memory), knows(config, fingerprint)
        for name in read_by:
            console.print(f"the memory in {name} has read {stream.name}: this is no held-out perplexity", markup=False)
        with ProgressBar(f"scoring {stream.name}", len(stream) - 1) as progress:
            scores = score_stream(
                model,
                stream.tokens,
                experts,
                memory,
                chunk_length(config, experts, model.hidden_size),
                slow_weights,
                make_history(experts, model),
                _show(progress),
            )
        details = {expert.name: expert.details() for expert in experts}
        mixed = None
        if len(experts) > 1:
            weights = _tuned_weights(tuned, names)
            fixed = config.mixture.weights
            mixed = mixed_scores(scores, experts, _gate_rule(config), model.vocabulary_size, config.run.seed, fixed, weights)
            scores.losses |= mixed.losses
            scores.seconds |= mixed.seconds
        metrics = _metrics(config, checkpoint, stream, scores, details)
        metrics |= {"remembered_before": remembered_before, "read_before_by": read_by}
        if mixed is not None:
            metrics["gate"] = _gate_metrics(mixed, names)
        metrics["tuned_on"] = None if tuned is None else {"stream": tuned.stream, "losses": tuned.losses}
        path = write_results(Path(config.run.folder), metrics, scores)
        _log_metrics(log, metrics)
        log.show(write_figures(Path(config.run.folder), metrics))
    print_tables(metrics)
    console.print(f"written to {path}")
    return metrics


def _load(config: Config, path: Path) -> Checkpoint:
    folder = find_checkpoint(path)
    check_same_settings(folder, config)
    checkpoint = load_checkpoint(folder)
    checkpoint.model.to(pick_device(config.run.device)).eval()
    return checkpoint


def _load_compiled_loops(config: Config, checkpoint: Checkpoint, stream: TokenStream, metric: Tensor | None) -> None:
    """Score a few tokens and forget them: the first call of each loop loads its machine code, or compiles it."""
    few = [name for name in config.evaluation.experts if name in ("mbpa", "cache")]
    evaluation, memory = replace(config.evaluation, experts=few), replace(config.memory, datastores=[])
    brief = replace(config, evaluation=evaluation, memory=memory, remote=RemoteConfig())
    experts = make_experts(brief, checkpoint)
    parts = (
        make_memory(brief, checkpoint, metric, ExitStack()),
        config.evaluation.chunk_length,
        None,
        make_history(experts, checkpoint.model),
    )
    score_stream(checkpoint.model, stream.tokens[:4], experts, *parts)
    OnlineGate(2, len(FEATURES), _gate_rule(config)).score(np.zeros((1, 2)), np.zeros((1, len(FEATURES))))


def _gate_rule(config: Config) -> GateRule:
    return GateRule(tuple(config.gate.rates), config.gate.shared)


def _tune(config: Config, checkpoint: Checkpoint) -> None:
    stream = _tokenize(config, checkpoint, own_corpus(config, checkpoint), "valid")
    tuned = tune(config, checkpoint, stream, load_tuned(checkpoint.folder, checkpoint.model.hidden_size))
    path = save_tuned(checkpoint.folder, tuned)
    print_tuned(tuned)
    console.print(f"written to {path}")


def _check_names(config: Config, experts: Sequence[str]) -> None:
    for name in config.mixture.weights:
        if name not in experts:
            raise ConfigError(f"mixture.weights names {name!r}, which is not run; {did_you_mean(name, experts)}")


def _tuned_weights(tuned: Tuned | None, experts: Sequence[str]) -> dict[str, float] | None:
    """Return the weights that were tuned for just these experts, None where there are none."""
    return tuned.weights if tuned is not None and set(tuned.weights) == {*experts, UNIFORM} else None


def _open_stream(config: Config, checkpoint: Checkpoint) -> tuple[TokenStream, str]:
    """Return the stream to be scored, and the fingerprint of its text."""
    evaluation = config.evaluation
    if evaluation.text:
        corpus: Corpus = WholeText(Path(evaluation.text), config.data.document_pattern)
    else:
        corpus = own_corpus(config, checkpoint)
    stream = _tokenize(config, checkpoint, corpus, evaluation.split)
    stream = stream.first(evaluation.max_tokens + 1) if evaluation.max_tokens else stream
    return stream, corpus.fingerprint(evaluation.split)


def _tokenize(config: Config, checkpoint: Checkpoint, corpus: Corpus, split: str) -> TokenStream:
    with token_progress(f"tokenizing {corpus.name} {split}") as progress:
        return open_stream(corpus, split, checkpoint.tokenizer, Path(config.data.token_folder), progress)


def _show(progress: ProgressBar) -> Callable[[int, StreamScores], None]:
    done = 0
    totals: dict[str, float] = defaultdict(float)

    def show(scored: int, scores: StreamScores) -> None:
        nonlocal done
        for name, losses in scores.losses.items():
            totals[name] += float(losses[done:scored].sum(dtype=np.float64))
        progress.reach(scored, ", ".join(f"{name} {perplexity(sum_ / scored):.1f}" for name, sum_ in totals.items()))
        done = scored

    return show


def _metrics(
    config: Config,
    checkpoint: Checkpoint,
    stream: TokenStream,
    scores: StreamScores,
    details: dict[str, dict[str, float]],
) -> dict[str, Any]:
    targets = Targets.of(stream, checkpoint.token_counts.numpy())
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
            "scored": len(stream) - 1,
            "words": targets.words,
            "characters": targets.characters,
            "documents": len(stream.document_starts),
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


def _gate_metrics(mixed: MixedScores, experts: Sequence[str]) -> dict[str, Any]:
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


def _log_metrics(log: RunLog, metrics: dict[str, Any]) -> None:
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
