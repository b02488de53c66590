"""Evaluation: a checkpoint and a held-out text in, metrics.json and a table out."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mbpa_lm.checkpoints.checkpoint import Checkpoint, check_same_settings, find_checkpoint, load_checkpoint
from mbpa_lm.checkpoints.pretrained import pretrained_checkpoint
from mbpa_lm.checkpoints.tuned import being_tuned, load_tuned, save_tuned
from mbpa_lm.config import Config, RemoteConfig
from mbpa_lm.data.corpora import Corpus
from mbpa_lm.data.streams import TokenStream, open_stream
from mbpa_lm.data.text_files import WholeText
from mbpa_lm.errors import AdaptationError, ConfigError, did_you_mean
from mbpa_lm.mixing.features import FEATURES
from mbpa_lm.mixing.gate import OnlineGate
from mbpa_lm.remembering.datastores import knows
from mbpa_lm.remembering.training_text import own_corpus
from mbpa_lm.reporting.figures import write_figures
from mbpa_lm.reporting.remarks import of_diverged
from mbpa_lm.reporting.report import print_tables, print_tuned, write_results
from mbpa_lm.reporting.run_metrics import gate_metrics, log_metrics, run_metrics
from mbpa_lm.reporting.tracking import RunLog
from mbpa_lm.scoring.documents import Scored, score_documents
from mbpa_lm.scoring.resources import (
    fill_in_scales,
    make_experts,
    make_history,
    make_memory,
)
from mbpa_lm.scoring.stream import score_stream
from mbpa_lm.scoring.verification import ON_CUDA, positions_to_verify, verify
from mbpa_lm.scoring.whole_pass import Pass, gate_rule
from mbpa_lm.system.processes import Processes
from mbpa_lm.system.progress import ProgressBar, console, token_progress
from mbpa_lm.tuning.everything import tune

SEARCH_DATASTORES = {"mbpa", "mbpa+persistent", "knn"}


def evaluate(
    config: Config, checkpoint_path: Path | None, tune_first: bool = False, verified_positions: int = 0
) -> dict[str, Any]:
    """Score a stream with every configured expert; write and return the metrics.

    Without a path, that is the model that `model.pretrained` names. With `tune_first`, the experts are tuned on the validation
    text before, and what is best is kept with the checkpoint. `verified_positions` are scored again without their future.
    Raises CheckpointError where the checkpoint is not of the configured model, tokenizer or text, DataError where the text
    cannot be read, and NumericalError for a prediction that is no probability or that depends on its future. Raises
    AdaptationError, once all is written, where an expert has diverged.
    """
    processes = Processes(config.run.device)
    _check_uses(config, processes, tune_first, verified_positions)
    checkpoint = pretrained_checkpoint(config) if checkpoint_path is None else _load(config, checkpoint_path, processes)
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
    _load_compiled_loops(config, checkpoint, stream, None if tuned is None else tuned.metric_tensor())
    streams = stream.documents() if config.evaluation.independent else [stream]
    silent = not processes.is_first
    with RunLog(Path(config.run.folder), config.tracking, "evaluate", asdict(config), silent) as log:
        read_by = knows(config, fingerprint)
        for name in read_by:
            console.print(f"the memory in {name} has read {stream.name}: this is no held-out perplexity", markup=False)
        one_pass = Pass(config, checkpoint, tuned)
        with ProgressBar(f"scoring {stream.name}", sum(len(part) - 1 for part in streams) // processes.count) as progress:
            if config.evaluation.independent:
                scored = score_documents(
                    streams, lambda part: one_pass.over(part, make_experts(config, checkpoint), progress), processes
                )
            else:
                scored = one_pass.over(stream, experts, progress)
        verified = _verify(one_pass, streams, scored, verified_positions, processes) if verified_positions else None
        metrics = run_metrics(config, checkpoint, stream, streams, scored)
        metrics |= {"verified_positions": verified.positions if verified else []}
        metrics |= {"remembered_before": one_pass.remembered_before, "read_before_by": read_by}
        metrics |= {"independent_documents": len(streams) if config.evaluation.independent else 0, "processes": processes.count}
        if scored.mixed is not None:
            metrics["gate"] = gate_metrics(scored.mixed, names)
        metrics["tuned_on"] = None if tuned is None else {"stream": tuned.stream, "losses": tuned.losses}
        if processes.is_first:
            path = write_results(Path(config.run.folder), metrics, scored.scores)
            log_metrics(log, metrics)
            log.show(write_figures(Path(config.run.folder), metrics))
            print_tables(metrics)
            if verified:
                same = f"the same within {verified.difference:.1g} nats" if verified.difference else "the same to the bit"
                console.print(f"verified: {same} without their future, and sums of one, at positions {verified.positions}")
            console.print(f"written to {path}")
    diverged = of_diverged(metrics["experts"], model.vocabulary_size)
    if diverged and config.evaluation.on_error == "stop":
        raise AdaptationError(diverged)
    if diverged and processes.is_first:
        console.print(diverged)
    return metrics


class Verified(NamedTuple):
    """Positions that were the same without their future, and by how many nats at most not quite."""

    positions: list[int]
    difference: float


def _verify(one_pass: Pass, streams: Sequence[TokenStream], scored: Scored, wanted: int, processes: Processes) -> Verified:
    """Score positions again, each process its share, and return which they were when all have found theirs the same."""
    config, checkpoint = one_pass.config, one_pass.checkpoint

    def score(part: TokenStream, position: int, chunk_length: int) -> Scored:
        with ProgressBar(f"verifying position {position:,}", len(part) - 1) as progress:
            again = Pass(config, checkpoint, one_pass.tuned)
            again.most_at_once = chunk_length
            return again.over(part, make_experts(config, checkpoint), progress, [position])

    vocabulary_size, seed = checkpoint.model.vocabulary_size, config.run.seed
    positions = positions_to_verify(streams, wanted, seed)
    own = positions[processes.rank :: processes.count]
    tolerance = ON_CUDA if processes.device.type == "cuda" else 0.0
    lengths = [one_pass.chunk_lengths.get(id(stream), one_pass.chunk_length) for stream in streams]
    found = verify(streams, own, scored.scores.losses, score, lengths, vocabulary_size, seed, tolerance)
    of_all = processes.total_array(np.eye(processes.count)[processes.rank] * found)
    return Verified(positions, float(of_all.max()))


def _check_uses(config: Config, processes: Processes, tune_first: bool, verified_positions: int) -> None:
    if processes.count > 1 and not config.evaluation.independent:
        raise ConfigError(
            f"{processes.count} processes cannot share one stream; add --evaluation.independent true, or start one process"
        )
    if tune_first and set(config.evaluation.experts) <= {"base"}:
        raise ConfigError("--tune has nothing to tune: evaluation.experts names no expert but base")
    if config.memory.datastores and not SEARCH_DATASTORES & set(config.evaluation.experts):
        wanted = ", ".join(sorted(SEARCH_DATASTORES))
        raise ConfigError(f"memory.datastores are searched by none of evaluation.experts; add one of {wanted}")
    if processes.count > 1 and tune_first:
        raise ConfigError("--tune is for one process; tune first, then evaluate with several")
    if config.evaluation.independent and config.remote.address:
        raise ConfigError("evaluation.independent begins each document with an empty memory; leave remote.address out")
    if verified_positions and config.remote.address:
        raise ConfigError("--verify begins again with an empty memory, and a database remembers; leave remote.address out")


def _load(config: Config, path: Path, processes: Processes) -> Checkpoint:
    folder = find_checkpoint(path)
    check_same_settings(folder, config)
    checkpoint = load_checkpoint(folder)
    checkpoint.model.to(processes.device).eval()
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
    OnlineGate(2, len(FEATURES), gate_rule(config)).score(np.zeros((1, 2)), np.zeros((1, len(FEATURES))))


def _tune(config: Config, checkpoint: Checkpoint) -> None:
    stream = _tokenize(config, checkpoint, own_corpus(config, checkpoint), "valid")
    with being_tuned(checkpoint.folder):
        tuned = tune(config, checkpoint, stream, load_tuned(checkpoint.folder, checkpoint.model.hidden_size))
        path = save_tuned(checkpoint.folder, tuned)
    print_tuned(tuned)
    console.print(f"written to {path}")


def _check_names(config: Config, experts: Sequence[str]) -> None:
    for name in config.mixture.weights:
        if name not in experts:
            raise ConfigError(f"mixture.weights names {name!r}, which is not run; {did_you_mean(name, experts)}")


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
