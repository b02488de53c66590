"""Training: text in, checkpoints out.

An LSTM reads the training text in rows side by side and carries its state from one piece to the next (truncated
BPTT); a transformer reads the same pieces as blocks. After each epoch the validation text is scored and the best
and the last checkpoint are kept. A run that was stopped goes on from its last checkpoint and ends with the same
weights, to the bit on a CPU, as one that never stopped.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mbpa_lm.checkpoint import (
    Checkpoint,
    TrainingPosition,
    find_checkpoint,
    has_checkpoint,
    save_checkpoint,
)
from mbpa_lm.config import Config
from mbpa_lm.data.corpora import Corpus, open_corpus
from mbpa_lm.data.pieces import Piece
from mbpa_lm.data.streams import SequenceBatches, TokenStream, count_tokens, open_stream
from mbpa_lm.data.tokenizers import Tokenizer, make_tokenizer
from mbpa_lm.errors import CheckpointError, ConfigError, Terminated
from mbpa_lm.machine import code_commit, describe_machine, pick_device
from mbpa_lm.metrics import perplexity
from mbpa_lm.models.base import State
from mbpa_lm.models.build import Model, build_model, check_model
from mbpa_lm.optimization import (
    averaged_weights,
    build_optimizer,
    has_averaged_weights,
    learning_rate,
    pack_optimizer,
    start_averaging,
    unpack_optimizer,
)
from mbpa_lm.precision import choose_precision, loss_scale
from mbpa_lm.progress import ProgressBar, console, token_progress
from mbpa_lm.resume import checkpoint_to_resume
from mbpa_lm.sampled_softmax import inclusion_probabilities, sampled_cross_entropy
from mbpa_lm.stopping import termination_requests
from mbpa_lm.tracking import RunLog
from mbpa_lm.validation import validation_batches, validation_loss


@dataclass
class Position:
    """How far a training run has come."""

    step: int = 0
    best_loss: float = math.inf
    epochs_without_gain: int = 0
    seconds: float = 0.0
    precision: str = "float32"
    validation_losses: list[float] = field(default_factory=list)


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
    run_folder = Path(config.run.folder)
    if has_checkpoint(run_folder) and not resume:
        raise ConfigError(f"run.folder {run_folder} already holds a run; add --resume to go on with it, or name another folder")
    check_model(config.model)
    corpus = open_corpus(config.data)
    checkpoint = checkpoint_to_resume(run_folder, config, corpus) if resume else None
    tokenizer = checkpoint.tokenizer if checkpoint else _make_tokenizer(config, corpus)
    streams = {split: _open_stream(config, corpus, split, tokenizer) for split in ("train", "valid")}
    torch.manual_seed(config.run.seed)
    model = checkpoint.model if checkpoint else build_model(config.model, tokenizer.vocabulary_size)
    run = _Run(config, corpus, tokenizer, streams, model.to(pick_device(config.run.device)), checkpoint)
    with (
        RunLog(run_folder, config.tracking.mode, config.tracking.project, "train", asdict(config)) as log,
        termination_requests() as asked_to_stop,
    ):
        return run.to_the_end(log, asked_to_stop)


class _Run:
    """The objects that a training run moves: model, optimizer, carried state and position."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        tokenizer: Tokenizer,
        streams: dict[str, TokenStream],
        model: Model,
        checkpoint: Checkpoint | None,
    ) -> None:
        training = config.training
        self.config, self.tokenizer, self.model = config, tokenizer, model
        self.folder = Path(config.run.folder)
        self.device = model.output_layer().weight.device
        self.corpus = {"name": corpus.name, **{split: corpus.fingerprint(split) for split in ("train", "valid")}}
        self.token_counts = torch.from_numpy(count_tokens(streams["train"].tokens, tokenizer.vocabulary_size))
        self.batches = SequenceBatches(streams["train"].tokens, training.batch_size, training.sequence_length)
        self.validation = validation_batches(streams["valid"], training)
        self.optimizer = build_optimizer(model, training)
        self.inclusion: Tensor | None = None
        if training.sampled_words:
            self.inclusion = inclusion_probabilities(self.token_counts, training.sampled_words).to(self.device)
        self.about = "~" if training.sampled_words else ""  # marks an estimate
        self.state: State | None = None
        self.gradient_norm = 0.0  # of the last step, before it was shortened
        self.position = Position(precision=choose_precision(training.precision, model, self.device))
        if checkpoint:
            self._restore(checkpoint)

    @property
    def steps(self) -> int:
        return self.config.training.epochs * self.batches.steps

    def to_the_end(self, log: RunLog, asked_to_stop: Callable[[], bool]) -> TrainingResult:
        position, training = self.position, self.config.training
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        console.print(
            f"training {parameters / 1e6:.1f}M parameters on {len(self.batches.tokens):,} tokens, "
            f"{training.epochs} epochs of {self.batches.steps} steps, {position.precision}, on {self.device}"
        )
        while position.step < self.steps and not self._has_stalled():
            epoch = position.step // self.batches.steps
            record = self._train_epoch(epoch, log, asked_to_stop)
            record |= self._validate()
            log.write(record)
            gained = position.epochs_without_gain == 0
            console.print(
                f"epoch {epoch + 1:3d}  train perplexity {self.about}{record['train/perplexity']:.2f}  valid "
                f"{record['valid/perplexity']:8.2f}{' *' if gained else '  '}  {record['train/tokens_per_second']:,.0f} "
                f"tokens/s  {position.seconds / 60:.1f} min"
            )
            self._save(is_best=gained)
        best = {"best/loss": position.best_loss, "best/perplexity": perplexity(position.best_loss)}
        log.summarize(best | {"steps": position.step, "seconds": position.seconds})
        return TrainingResult(find_checkpoint(self.folder), position.best_loss, position.step, position.seconds)

    def _train_epoch(self, epoch: int, log: RunLog, asked_to_stop: Callable[[], bool]) -> dict[str, Any]:
        position, training = self.position, self.config.training
        first = position.step - epoch * self.batches.steps
        if first == 0:
            self.state = None
        tokens_a_step = training.batch_size * training.sequence_length
        self.model.train()
        total, started, before = 0.0, time.perf_counter(), position.seconds
        with ProgressBar(f"epoch {epoch + 1}", (self.batches.steps - first) * tokens_a_step) as progress:
            for done, (inputs, targets) in enumerate(self.batches.batches(self.config.run.seed, epoch, first), start=1):
                loss = self._step(inputs, targets)
                self._check_finite(loss, "loss")
                total += loss
                position.step += 1
                position.seconds = before + time.perf_counter() - started
                progress.advance(tokens_a_step, f"train perplexity {self.about}{perplexity(total / done):.1f}")
                if done == self.batches.steps - first:
                    break  # it is saved when it has been validated
                is_due, stops = bool(training.save_steps) and position.step % training.save_steps == 0, asked_to_stop()
                if is_due:
                    log.write({"step": position.step, "train/loss": loss, "train/gradient_norm": self.gradient_norm})
                if is_due or stops:  # once: a second save of a step would first remove the one that is pointed to
                    self._save(is_best=False)
                if stops:
                    raise Terminated(
                        f"stopped by SIGTERM at step {position.step:,} of {self.steps:,}, saved; go on with --resume"
                    )
        seconds = time.perf_counter() - started
        return {
            "step": position.step,
            "epoch": epoch + 1,
            "train/loss": total / done,
            "train/perplexity": perplexity(total / done),
            "train/tokens_per_second": done * tokens_a_step / seconds,
            "train/learning_rate": learning_rate(position.step - 1, self.steps, training),
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
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.position.step, self.steps, training)
        state = self.state if self.model.carries_state_in_training else None
        with self._autocast():
            output = self.model(torch.from_numpy(inputs).to(self.device), state)
            losses = self._losses(output.hidden_states.flatten(0, 1), torch.from_numpy(targets).to(self.device).flatten())
        loss = losses.float().mean()
        self.optimizer.zero_grad(set_to_none=True)
        scale = loss_scale(self.position.precision, self.device)
        ((loss + output.penalty) * scale).backward()
        if scale != 1:
            torch._foreach_div_([weight.grad for weight in self.model.parameters() if weight.grad is not None], scale)
        longest = training.gradient_norm or math.inf
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest))
        self.optimizer.step()
        self.state = output.state
        return float(loss.detach())

    def _losses(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        layer = self.model.output_layer()
        if self.inclusion is not None:
            return sampled_cross_entropy(layer, hidden_states, targets, self.inclusion)
        logits = layer.logits(hidden_states)
        # Outside autocast the loss reads bfloat16 logits and sums in float32, with no float32 copy of (tokens x V).
        with torch.autocast(self.device.type, enabled=False):
            return cross_entropy(logits, targets, reduction="none")

    def _validate(self) -> dict[str, float]:
        position, training, started = self.position, self.config.training, time.perf_counter()
        with averaged_weights(self.optimizer), self._autocast():
            loss = validation_loss(self.model, self.validation, self.device)
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

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.position.precision == "bfloat16")

    def _save(self, is_best: bool) -> None:
        packed = self._pack()  # the weights being trained, before their averages take their place
        with averaged_weights(self.optimizer):
            save_checkpoint(
                self.config,
                self.position.step,
                self.model,
                self.tokenizer,
                self.token_counts,
                self.corpus,
                packed,
                is_best,
            )

    def _pack(self) -> TrainingPosition:
        tensors, plain = pack_optimizer(self.optimizer)
        packed = {f"optimizer.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        packed["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            packed["random_cuda"] = torch.cuda.get_rng_state(self.device)
        for index, tensor in enumerate(self.state or ()):
            packed[f"state.{index}"] = tensor.detach().contiguous()
        if has_averaged_weights(self.optimizer):
            packed |= {f"weights.{index}": weight.detach().clone() for index, weight in enumerate(self.model.parameters())}
        values = {
            "position": asdict(self.position),
            "optimizer": plain,
            "training": asdict(self.config.training),
            "seed": self.config.run.seed,
            "command": shlex.join(sys.argv),
            "commit": code_commit(),
            "machine": describe_machine(self.device),
        }
        return TrainingPosition(packed, values)

    def _restore(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.position is not None
        tensors, values = checkpoint.position.tensors, checkpoint.position.values
        try:
            unpack_optimizer(self.optimizer, _strip(tensors, "optimizer."), values["optimizer"])
            state = _strip(tensors, "state.")
            self.state = tuple(state[str(index)].to(self.device) for index in range(len(state))) or None
            self.position = Position(**values["position"])
            if has_averaged_weights(self.optimizer):
                with torch.no_grad():
                    for index, weight in enumerate(self.model.parameters()):
                        weight.copy_(tensors[f"weights.{index}"])
            torch.set_rng_state(tensors["random"])
            if self.device.type == "cuda" and "random_cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random_cuda"], self.device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint.folder} cannot be resumed: its training state is damaged ({error})") from None


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


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
