"""A training run: text in, checkpoints out.

An LSTM reads the training text in rows side by side and carries its state from one piece to the next (truncated
BPTT); a transformer reads the same pieces as blocks. After each epoch the validation text is scored and the best
and the last checkpoint are kept. A run that was stopped goes on from its last checkpoint and ends with the same
weights, to the bit on a CPU, as one that never stopped. Several processes share the rows of a batch (processes.py).
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbpa_lm.checkpoints.checkpoint import (
    Checkpoint,
    distinct_weights,
    find_checkpoint,
    last_checkpoint,
    save_checkpoint,
)
from mbpa_lm.config import Config
from mbpa_lm.data.corpora import Corpus, open_corpus
from mbpa_lm.data.pieces import Piece
from mbpa_lm.data.streams import SequenceBatches, TokenStream, count_tokens, open_stream
from mbpa_lm.data.tokenizers import Tokenizer, make_tokenizer
from mbpa_lm.errors import DAMAGES, CheckpointError, ConfigError, RunFolderError, Terminated, reason
from mbpa_lm.models.base import State
from mbpa_lm.models.build import Model, blocks_of, build_model, check_model
from mbpa_lm.numerics.perplexities import perplexity
from mbpa_lm.reporting.tracking import RunLog, check_free
from mbpa_lm.system.processes import Processes
from mbpa_lm.system.progress import ProgressBar, console, counted, token_progress
from mbpa_lm.training.hebbian import HebbianRule
from mbpa_lm.training.objective import TrainingObjective
from mbpa_lm.training.optimization import averaged_weights, build_optimizer, learning_rate, start_averaging, take_step
from mbpa_lm.training.position import Position
from mbpa_lm.training.precision import choose_precision
from mbpa_lm.training.resume import checkpoint_to_resume
from mbpa_lm.training.sampled_softmax import inclusion_probabilities
from mbpa_lm.training.saved_state import pack, restore
from mbpa_lm.training.stopping import termination_requests
from mbpa_lm.training.validation import validation_batches, validation_loss


@dataclass(frozen=True)
class TrainingResult:
    """What a training run ended with; losses are in nats a token."""

    checkpoint: Path
    best_validation_loss: float
    steps: int
    seconds: float


def train(config: Config, resume: bool = False) -> TrainingResult:
    """Train the configured model and return where its best checkpoint is.

    Raises ConfigError, DataError or CheckpointError before any training where something does not fit, CheckpointError where a
    checkpoint cannot be written, and Terminated, after saving one, where SIGTERM asks it to stop.
    """
    config = in_sweep(config)
    run_folder = Path(config.run.folder)
    processes = Processes(config.run.device)
    if processes.is_first:
        check_free(run_folder)
    found = last_checkpoint(run_folder)
    if found and not resume:
        raise ConfigError(f"run.folder {run_folder} already holds a run; add --resume to go on with it, or name another folder")
    check_model(config.model)
    check_training(config, processes)
    corpus = open_corpus(config.data)
    checkpoint = checkpoint_to_resume(run_folder, config, corpus) if resume else None
    tokenizer = checkpoint.tokenizer if checkpoint else _make_tokenizer(config, corpus)
    processes.check_equal("the tokenizer", tokenizer.fingerprint())
    streams = {split: _open_stream(config, corpus, split, tokenizer) for split in ("train", "valid")}
    torch.manual_seed(config.run.seed)
    model = checkpoint.model if checkpoint else build_model(config.model, tokenizer.vocabulary_size)
    run = TrainingRun(config, corpus, tokenizer, streams, model.to(processes.device), checkpoint, processes)
    with (
        RunLog(run_folder, config.tracking, "train", asdict(config), silent=not processes.is_first) as log,
        termination_requests() as asked_to_stop,
    ):
        if last_checkpoint(run_folder) != found:  # before this process held the folder
            raise RunFolderError(f"run.folder {run_folder} has been written by another process meanwhile; begin again")
        return run.to_the_end(log, asked_to_stop)


def in_sweep(config: Config) -> Config:
    """Give a run that an agent of a Weights & Biases sweep started a folder of its own inside `run.folder`."""
    if not os.environ.get("WANDB_SWEEP_ID") or not os.environ.get("WANDB_RUN_ID"):
        return config
    return replace(config, run=replace(config.run, folder=str(Path(config.run.folder) / os.environ["WANDB_RUN_ID"])))


def check_training(config: Config, processes: Processes) -> None:
    """Raise ConfigError for settings that do not go with the processes that train."""
    training = config.training
    if training.batch_size % processes.count:
        raise ConfigError(f"training.batch_size {training.batch_size} cannot be shared equally by {processes.count} processes")
    if processes.shards_weights:
        for name, is_set in (
            ("model.kind lstm", config.model.kind == "lstm"),
            ("training.optimizer asgd", training.optimizer == "asgd"),
            ("training.hebbian_limit", bool(training.hebbian_limit)),
        ):
            if is_set:
                raise ConfigError(f"{name} needs whole weights in every process; launch without FSDP")


class TrainingRun:
    """The objects that a training run moves: model, optimizer, carried state and position."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        tokenizer: Tokenizer,
        streams: dict[str, TokenStream],
        model: Model,
        checkpoint: Checkpoint | None,
        processes: Processes,
    ) -> None:
        training = config.training
        self.config, self.tokenizer, self.model, self.processes = config, tokenizer, model, processes
        self.folder = Path(config.run.folder)
        self.corpus = {"name": corpus.name, **{split: corpus.fingerprint(split) for split in ("train", "valid")}}
        self.token_counts = torch.from_numpy(count_tokens(streams["train"].tokens, tokenizer.vocabulary_size))
        self.batches = SequenceBatches(streams["train"].tokens, training.batch_size, training.sequence_length)
        self.rows = processes.rows(training.batch_size)
        self.validation = validation_batches(streams["valid"], training, processes.count)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.weight_names = list(distinct_weights(model))
        self.hebbian = HebbianRule(training.hebbian_limit, training.hebbian_floor, tokenizer.vocabulary_size, processes)
        inclusion = inclusion_probabilities(self.token_counts, training.sampled_words) if training.sampled_words else None
        self.about = "~" if training.sampled_words else ""  # marks an estimate
        precision = choose_precision(training.precision, model, processes.device)
        if processes.total([precision == "bfloat16"])[0] < processes.count:
            precision = "float32"  # in all, where one of them is slower in bfloat16
        if checkpoint and checkpoint.position:
            precision = checkpoint.position.values["position"].get("precision", precision)
        objective = TrainingObjective(model, inclusion, precision, processes)
        self.objective = processes.prepare(objective, blocks_of(model), precision == "bfloat16")
        self.optimizer = build_optimizer(model, training)
        self.state: State | None = None
        self.gradient_norm = 0.0  # of the last step, before it was shortened
        self.position = Position(precision=precision)
        if checkpoint and checkpoint.position:
            try:
                saved = restore(checkpoint.position, model, self.optimizer, self.hebbian, processes)
            except (*DAMAGES, RuntimeError, ConfigError) as error:
                raise CheckpointError(
                    f"{checkpoint.folder} cannot be resumed: its training state is damaged ({reason(error)})"
                ) from None
            self.position, self.state = saved

    @property
    def steps(self) -> int:
        return self.config.training.epochs * self.batches.steps

    def to_the_end(self, log: RunLog, asked_to_stop: Callable[[], bool]) -> TrainingResult:
        position, training = self.position, self.config.training
        count = self.processes.count
        together = f", {count} processes together" if count > 1 else ""
        epochs, steps = counted(training.epochs, "epoch"), counted(self.batches.steps, "step")
        console.print(
            f"training {self.parameters / 1e6:.1f}M parameters on {len(self.batches.tokens):,} tokens, {epochs} of {steps}, "
            f"{position.precision}, on {self.processes.device}{together}\n"
            f"*: the best validation perplexity so far{'; ~: estimated from the words sampled' if self.about else ''}"
        )
        if position.step >= self.steps:
            console.print(f"all {epochs} are done: nothing is left to train")
        while position.step < self.steps and not self._has_stalled():
            epoch = position.step // self.batches.steps
            record = self._train_epoch(epoch, log, asked_to_stop)
            record |= self._validate()
            log.write(record)
            gained = position.epochs_without_gain == 0
            console.print(
                f"epoch {epoch + 1:3d}  train perplexity {self.about + format(record['train/perplexity'], '.2f'):>8}  valid "
                f"{record['valid/perplexity']:8.2f}{' *' if gained else '  '}  {record['train/tokens_per_second']:,.0f} "
                f"tokens/s  {position.seconds / 60:.1f} min"
            )
            self._save(is_best=gained)
        best = {"best/loss": position.best_loss, "best/perplexity": perplexity(position.best_loss)}
        log.summarize(best | {"steps": position.step, "seconds": position.seconds})
        self._keep_checkpoints(log)
        return TrainingResult(find_checkpoint(self.folder), position.best_loss, position.step, position.seconds)

    def _keep_checkpoints(self, log: RunLog) -> None:
        aliases: dict[Path, list[str]] = {}
        for which in ("best", "last"):
            aliases.setdefault(find_checkpoint(self.folder, which), []).append(which)
        for folder, names in aliases.items():
            log.keep_checkpoint(folder, names)

    def _train_epoch(self, epoch: int, log: RunLog, asked_to_stop: Callable[[], bool]) -> dict[str, Any]:
        position, training = self.position, self.config.training
        first = position.step - epoch * self.batches.steps
        if first == 0:
            self.state = None
        tokens_a_step = training.batch_size * training.sequence_length
        self.objective.train()
        total, started, before = 0.0, time.perf_counter(), position.seconds
        with ProgressBar(f"epoch {epoch + 1}", (self.batches.steps - first) * tokens_a_step) as progress:
            for done, (inputs, targets) in enumerate(self.batches.batches(self.config.run.seed, epoch, first), start=1):
                loss, stop_requests = self.processes.total([self._step(inputs, targets), asked_to_stop()])
                loss /= self.processes.count
                self._check_finite(loss, "loss")
                total += loss
                position.step += 1
                position.seconds = before + time.perf_counter() - started
                progress.advance(tokens_a_step, f"train perplexity {self.about}{perplexity(total / done):.1f}")
                if done == self.batches.steps - first:
                    break  # it is saved when it has been validated
                is_due, stops = bool(training.save_steps) and position.step % training.save_steps == 0, stop_requests > 0
                if position.step % self.config.tracking.log_steps == 0:
                    log.write(self._progress_record(loss, done * tokens_a_step / (time.perf_counter() - started)))
                if is_due or stops:  # once: a second save of a step would first remove the one that is pointed to
                    self._save(is_best=False)
                if stops:
                    raise Terminated(
                        f"stopped by SIGTERM at step {position.step:,} of {self.steps:,}, saved; go on with --resume"
                    )
        record = self._progress_record(total / done, done * tokens_a_step / (time.perf_counter() - started))
        return {**record, "epoch": epoch + 1, "train/perplexity": perplexity(total / done)}

    def _progress_record(self, loss: float, tokens_per_second: float) -> dict[str, Any]:
        return {
            "step": self.position.step,
            "train/loss": loss,
            "train/tokens_per_second": tokens_per_second,
            "train/learning_rate": learning_rate(self.position.step - 1, self.steps, self.config.training),
            "train/gradient_norm": self.gradient_norm,
        }

    def _check_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            rate = learning_rate(self.position.step, self.steps, self.config.training)
            raise ConfigError(
                f"training diverged at step {self.position.step}: the {what} is {loss} at learning rate {rate:.2g}, after a "
                f"gradient of norm {self.gradient_norm:.2g}; start again in another run.folder with a lower "
                f"training.learning_rate or training.gradient_norm"
            )

    def _step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """Read a batch, take one optimizer step and return the loss in nats a token, penalties left out."""
        training, position, device = self.config.training, self.position, self.processes.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(position.step, self.steps, training)
        state = self.state if self.model.carries_state_in_training else None
        tokens, next_tokens = (torch.from_numpy(part[self.rows]).to(device) for part in (inputs, targets))
        output = self.objective(tokens, next_tokens, state)
        loss, longest = output.loss + output.penalty, training.gradient_norm
        self.gradient_norm = take_step(self.model, self.optimizer, loss, position.precision, longest, self.processes)
        if training.hebbian_limit:
            self.hebbian.move_rows(self.model.output_layer().weight, output.hidden_states, next_tokens.flatten())
        self.state = output.state
        return float(output.loss.detach())

    def _validate(self) -> dict[str, float]:
        position, training, started = self.position, self.config.training, time.perf_counter()
        with averaged_weights(self.optimizer):
            loss = validation_loss(self.objective, self.validation, self.processes)
        self._check_finite(loss, "validation loss")
        position.seconds += time.perf_counter() - started
        gained = loss < position.best_loss
        position.best_loss = min(loss, position.best_loss)
        position.epochs_without_gain = 0 if gained else position.epochs_without_gain + 1
        position.validation_losses.append(loss)
        if training.optimizer == "asgd":
            earlier = position.validation_losses[: -training.averaging_patience - 1]
            if earlier and loss > min(earlier):
                start_averaging(self.optimizer)
        return {"valid/loss": loss, "valid/perplexity": perplexity(loss)}

    def _has_stalled(self) -> bool:
        patience = self.config.training.patience
        stalled = bool(patience) and self.position.epochs_without_gain >= patience
        if stalled:
            console.print(f"stopped: no better validation loss in {patience} epochs")
        return stalled

    def _save(self, is_best: bool) -> None:
        packed = pack(
            self.config, self.position, self.optimizer, self.state, self.hebbian, self.processes
        )  # the weights being trained, before their averages take their place
        with averaged_weights(self.optimizer):
            named = self.model.state_dict()
            weights = self.processes.whole({name: named[name] for name in self.weight_names})
        if self.processes.is_first:
            step, corpus = self.position.step, self.corpus
            save_checkpoint(self.config, step, weights, self.tokenizer, self.token_counts, corpus, packed, is_best)
        self.processes.wait()


def _make_tokenizer(config: Config, corpus: Corpus) -> Tokenizer:
    with ProgressBar(f"reading {corpus.name} for a {config.tokenizer.kind} vocabulary", None, unit="characters") as progress:

        def pieces() -> Iterator[Piece]:
            for piece in corpus.pieces("train"):
                yield piece
                progress.advance(len(piece.text))

        return make_tokenizer(config.tokenizer, pieces())


def _open_stream(config: Config, corpus: Corpus, split: str, tokenizer: Tokenizer) -> TokenStream:
    with token_progress(f"tokenizing {corpus.name} {split}") as progress:
        return open_stream(corpus, split, tokenizer, Path(config.data.token_folder), progress)
