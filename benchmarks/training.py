"""How fast models train, beside a plain PyTorch loop, and how near that comes to what the machine can do.

    python benchmarks/training.py --output runs/training.json            # all sizes, some minutes on two cores
    python benchmarks/training.py --quick --output runs/training.json    # the small ones, a few steps

"plain" is `torch.nn.LSTM` with dropout between its layers, a linear layer, `cross_entropy` on the whole matrix of logits and
AdamW, in the same arithmetic: what a user would write first. "ours" is the training step of `train.py`: the regularizers of the
AWD-LSTM, the configured loss, the gradient's norm, AdamW. Both on batches from the same loader. "utilisation" is operations of
the matrix products that a step needs (6 a weight and token) over time, as a share of the rate at which this machine multiplies
matrices of 2048 x 2048 in that arithmetic, measured in the same process. "loader" is how many tokens a second can be read from
a memory-mapped token file, with nothing else to do.

The second table is the loss alone, forward and backward, of 1,600 positions of d = 400: time and memory beyond what layer,
hidden states and gradients take. Each row runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mbpa_lm.config import ModelConfig, TrainingConfig
from mbpa_lm.data.streams import SequenceBatches
from mbpa_lm.models.base import OutputLayer
from mbpa_lm.models.build import build_model
from mbpa_lm.system.machine import describe_machine, keep_freed_memory, peak_memory_bytes, pick_device, resident_bytes
from mbpa_lm.system.processes import Processes
from mbpa_lm.training.chunked_softmax import chunked_cross_entropy
from mbpa_lm.training.objective import TrainingObjective
from mbpa_lm.training.optimization import build_optimizer, take_step
from mbpa_lm.training.precision import choose_precision
from mbpa_lm.training.sampled_softmax import inclusion_probabilities, sampled_cross_entropy

Row = dict[str, Any]
POSITIONS, HIDDEN_SIZE = 1600, 400


@dataclass(frozen=True)
class Case:
    """A model to train on batches of `batch_size` x `sequence_length` tokens."""

    name: str
    model: ModelConfig
    vocabulary_size: int
    sampled_words: int
    batch_size: int = 32
    sequence_length: int = 50


AWD = ModelConfig(hidden_size=1150, embedding_size=400, layers=3, weight_dropout=0.5, activation_penalty=2, change_penalty=1)
GPT2 = ModelConfig(
    kind="transformer",
    settings={"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 128, "activation_function": "relu", "attn_pdrop": 0.0},
    context_length=128,
    context_overlap=64,
)
CASES = [
    Case("LSTM 2 x 400", ModelConfig(), 10_000, 0),
    Case("LSTM 2 x 400", ModelConfig(), 10_000, 1_500),
    Case("LSTM 2 x 400", ModelConfig(), 33_278, 2_000),
    Case("LSTM 2 x 400", ModelConfig(), 33_278, 0),
    Case("AWD-LSTM 3 x 1150", AWD, 10_000, 0, 80, 70),
    Case("GPT-2 4 x 256", GPT2, 10_000, 1_500, 16, 128),
    Case("LSTM 2 x 400", ModelConfig(), 267_735, 4_000),
]
QUICK = CASES[1:2]


class PlainLSTM(nn.Module):
    """What a user would write first."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.layers, dropout=config.dropout, batch_first=True)
        self.output = nn.Linear(config.hidden_size, vocabulary_size)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.lstm(self.embedding(tokens))[0])
        return logits


def product_rate(precision: str, device: torch.device) -> float:
    """Measure the operations a second of a product of 2048 x 2048 matrices."""
    left = torch.randn(2048, 2048, device=device, dtype=getattr(torch, precision))
    seconds = median_seconds(lambda: left @ left, device, repeats=7)
    return 2 * 2048**3 / seconds


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def zipf_tokens(count: int, vocabulary_size: int) -> np.ndarray:
    weights = 1 / np.arange(1, vocabulary_size + 1)
    return np.random.default_rng(0).choice(vocabulary_size, count, p=weights / weights.sum()).astype(np.uint32)


def batches_from_file(case: Case, folder: str) -> SequenceBatches:
    path = Path(folder) / "tokens.bin"
    zipf_tokens(60 * case.batch_size * case.sequence_length, case.vocabulary_size).tofile(path)
    return SequenceBatches(np.memmap(path, dtype=np.uint32, mode="r"), case.batch_size, case.sequence_length)


def product_weights(case: Case, model: nn.Module) -> int:
    """Weights that a token is multiplied with: all matrices but the embedding, and what is used of the output layer."""
    table = max(parameter.numel() for parameter in model.parameters())  # tied: embedding and output layer in one
    inner = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2) - table
    return inner + table // case.vocabulary_size * (case.sampled_words or case.vocabulary_size)


def forever(batches: SequenceBatches) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        for inputs, targets in batches.batches(0, epoch):
            yield torch.from_numpy(inputs), torch.from_numpy(targets)
        epoch += 1


def our_step(case: Case, model: Any, precision: str, batches: SequenceBatches) -> Callable[[], object]:
    processes, training = Processes("auto"), TrainingConfig()
    counts = torch.from_numpy(np.bincount(batches.tokens, minlength=case.vocabulary_size))
    inclusion = inclusion_probabilities(counts, case.sampled_words) if case.sampled_words else None
    objective = TrainingObjective(model, inclusion, precision, processes).train()
    optimizer, source = build_optimizer(model, training), forever(batches)
    state = None

    def step() -> None:
        nonlocal state
        tokens, targets = (part.to(processes.device) for part in next(source))
        output = objective(tokens, targets, state if model.carries_state_in_training else None)
        take_step(model, optimizer, output.loss + output.penalty, precision, training.gradient_norm, processes)
        state = output.state
        output.loss.item()

    return step


def plain_step(case: Case, precision: str, batches: SequenceBatches, device: torch.device) -> Callable[[], object]:
    model = PlainLSTM(case.model, case.vocabulary_size).to(device)
    optimizer, source = torch.optim.AdamW(model.parameters(), lr=3e-3), forever(batches)

    def step() -> None:
        tokens, targets = (part.to(device) for part in next(source))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        loss.item()

    return step


def measure_training(case: Case, with_plain: bool, repeats: int, results: Any) -> None:
    keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    device = pick_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        batches = batches_from_file(case, folder)
        model = build_model(case.model, case.vocabulary_size).to(device)
        precision = choose_precision("auto", model, device)
        tokens = case.batch_size * case.sequence_length
        loader = forever(batches)
        rate = product_rate(precision, device)
        row: Row = {
            "model": case.name,
            "vocabulary": case.vocabulary_size,
            "sampled": case.sampled_words,
            "precision": precision,
            "ours": tokens / median_seconds(our_step(case, model, precision, batches), device, repeats),
            "peak": peak_memory_bytes(),
            "product_rate": rate,
            "loader": tokens / median_seconds(lambda: next(loader), torch.device("cpu"), 50),
        }
        row["utilisation"] = 6 * product_weights(case, model) * row["ours"] / rate
        if with_plain:
            del model
            row["plain"] = tokens / median_seconds(plain_step(case, precision, batches, device), device, repeats)
    results.put(row)


def measure_loss(kind: str, vocabulary_size: int, repeats: int, results: Any) -> None:
    torch.manual_seed(0)
    device, low = pick_device("auto"), torch.bfloat16
    weight = (torch.randn(vocabulary_size, HIDDEN_SIZE, device=device) * 0.05).requires_grad_()
    layer = OutputLayer(weight, torch.zeros(vocabulary_size, device=device, requires_grad=True))
    hidden_states = torch.randn(POSITIONS, HIDDEN_SIZE, device=device, requires_grad=True)
    targets = torch.from_numpy(zipf_tokens(POSITIONS, vocabulary_size).astype(np.int64)).to(device)
    inclusion = inclusion_probabilities(100_000 // torch.arange(1, vocabulary_size + 1), 4_000).to(device)

    def loss() -> Tensor:
        if kind == "ours, sampled 4,000":
            return sampled_cross_entropy(layer, hidden_states, targets, inclusion).mean()
        if kind == "ours, chunked":
            return chunked_cross_entropy(layer, hidden_states, targets, low)
        if kind == "plain":
            return cross_entropy(layer.logits(hidden_states), targets)
        fused: Tensor = torch.nn.functional.linear_cross_entropy(
            hidden_states, weight, targets, linear_bias=layer.bias, options=torch.nn.LinearCrossEntropyOptions()
        )
        return fused

    def step() -> None:
        weight.grad = hidden_states.grad = layer.bias.grad = None  # type: ignore[union-attr]
        with torch.autocast(device.type, low):
            value = loss()
        value.backward()

    before = resident_bytes() + 4 * (weight.numel() + hidden_states.numel())
    row = {"loss": kind, "vocabulary": vocabulary_size, "seconds": median_seconds(step, device, repeats)}
    if device.type == "cuda":
        fixed = 2 * 4 * (weight.numel() + hidden_states.numel())
        results.put({**row, "memory": torch.cuda.max_memory_allocated(device) - fixed})
    else:
        results.put({**row, "memory": peak_memory_bytes() - before})


def in_process(function: Callable[..., None], *arguments: Any) -> Row | None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    while process.is_alive() and results.empty():
        time.sleep(0.1)
    row: Row | None = None if results.empty() else results.get()
    process.join()
    return row


def print_tables(training: list[Row], losses: list[Row], console: Console) -> None:
    table = Table("model", "vocabulary", "sampled", "precision", "ours, tokens/s", "plain", "utilisation", "loader", "peak MB")
    for row in training:
        plain = f"{row['plain']:,.0f}" if "plain" in row else ""
        speeds = [
            f"{row['ours']:,.0f}",
            plain,
            f"{row['utilisation']:.0%}",
            f"{row['loader']:,.0f}",
            f"{row['peak'] / 1e6:,.0f}",
        ]
        table.add_row(row["model"], f"{row['vocabulary']:,}", f"{row['sampled']:,}", row["precision"], *speeds)
    console.print(table)
    table = Table("loss", "vocabulary", "ms", "memory MB")
    for row in losses:
        memory = f"{row['memory'] / 1e6:,.0f}"
        table.add_row(row["loss"], f"{row['vocabulary']:,}", f"{row['seconds'] * 1e3:,.0f}", memory)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    repeats = 3 if arguments.quick else 9
    training: list[Row] = []
    losses: list[Row] = []
    for case in QUICK if arguments.quick else CASES:
        with_plain = case.model == ModelConfig() and case.vocabulary_size < 100_000
        row = in_process(measure_training, case, with_plain, repeats)
        training += [] if row is None else [row]
    kinds = ["ours, sampled 4,000", "ours, chunked", "plain"]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        kinds.append("torch's linear_cross_entropy")
    for vocabulary_size in (10_000,) if arguments.quick else (10_000, 33_278, 267_735):
        for kind in kinds[:3] if vocabulary_size > 100_000 else kinds:  # PyTorch's would take minutes a step
            row = in_process(measure_loss, kind, vocabulary_size, 3 if vocabulary_size > 100_000 else repeats)
            losses += [] if row is None else [row]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(pick_device("auto"))
    arguments.output.write_text(json.dumps({"machine": machine, "training": training, "losses": losses}, indent=1))
    print_tables(training, losses, Console(width=140))


if __name__ == "__main__":
    main()
