"""What a memory costs a causal language model of transformers: scoring and generation, with and without, beside kNN-LM.

    python benchmarks/huggingface.py --output runs/huggingface.json
    python benchmarks/huggingface.py --quick --output runs/huggingface.json     # 10 M parameters, 10,000 entries

Models are GPT-2s of random weights. The memory holds documents: hidden states of random text, each copied with some noise until
there are as many entries as are asked for, with the index that their number asks for; K = 32. "plain" is the model alone,
"reading" with a memory that is read, "writing" with one that is written to as well (`write="everything"`). "kNN-LM" is what
wrappers of research code do at each position (Alon et al. 2022, `knn-transformers`): search the same index for K + 8, take
their keys and measure them again, turn distances into probabilities, and mix the two distributions over the whole vocabulary.
Scoring is of texts of 256 tokens, generation of 32 tokens after 16. The ways take turns, so that what disturbs one disturbs
all; numbers are tokens a second, medians of the rounds. Each model runs in a process of its own; peak memory is that of the
process when nothing but the plain model has run, and when the memory has been made and used.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

K, SCORED, PROMPT, GENERATED = 32, 256, 16, 32
SIZES = {"10M": (4, 4, 192), "124M": (12, 12, 768), "355M": (24, 16, 1024)}
"""Layers, heads, width; 10M has so few numbers beside its embeddings that the vocabulary decides."""
NOISE, READ = 0.1, 4096
Row = dict[str, Any]


def make_model(size: str, vocabulary: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width = SIZES[size]
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width)).eval()


def fill(memory: Any, entries: int, folder: Path) -> None:
    """Give a memory documents of so many entries, of which a few were really read."""
    from mbpa_lm.adaptation.likely_words import likely_words
    from mbpa_lm.adaptation.problem import normalize
    from mbpa_lm.memory.base import Entries
    from mbpa_lm.memory.datastore.manifest import Layout
    from mbpa_lm.memory.datastore.store import Datastore

    model, layer = memory.language_model, memory.language_model.output_layer()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.vocabulary_size, (1, READ), generator=generator)
    with torch.no_grad():
        keys = model(tokens).hidden_states[0]
    layout = Layout(model.hidden_size, memory.config.likely_words)
    with Datastore.create(folder, memory.identity, layout) as store:
        while len(store) < entries:
            near = keys + NOISE * keys.std() * torch.randn(keys.shape, generator=generator)
            near = near[: entries - len(store)]
            parts = []
            for part in near.split(256):
                with torch.no_grad():
                    base, log_partitions = normalize(layer.logits(part))
                values = torch.randint(0, model.vocabulary_size, (len(part),), generator=generator)
                parts.append(Entries(part, values, log_partitions, *likely_words(base, layout.likely_words)))
            store.add(Entries(*(torch.cat(column) for column in zip(*(part.tensors() for part in parts), strict=True))))
        if store.needs_index():
            store.build_index()


class KnnLm:
    """kNN-LM as a hook on the output layer, over the index and the keys of a datastore."""

    def __init__(self, store: Any, values: Tensor, keys: np.ndarray, weight: float = 0.25) -> None:
        self.store, self.values, self.keys, self.weight = store, values, keys, weight
        self.hidden_states: Tensor | None = None

    def before(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.hidden_states = inputs[0]

    def after(self, module: Any, inputs: Any, logits: Tensor) -> Tensor:
        assert self.hidden_states is not None
        queries = self.hidden_states.flatten(0, 1)
        index = self.store._open_index()
        rows = index.searched.search(queries.numpy(), K + 8)[1] if index is not None else self._exact(queries)
        differences = torch.from_numpy(self.keys[rows]).float() - queries[:, None]
        distances, order = differences.square().sum(-1).topk(K, largest=False)
        words = self.values[torch.from_numpy(rows).gather(1, order)]
        mixed = torch.log_softmax(logits.flatten(0, 1), dim=-1).exp_().mul_(1 - self.weight)
        mixed.scatter_add_(1, words, self.weight * torch.softmax(-distances, dim=-1))
        return mixed.log_().view(logits.shape)

    def _exact(self, queries: Tensor) -> np.ndarray:
        import faiss

        return np.asarray(faiss.knn(queries.numpy(), self.keys.astype(np.float32), K + 8)[1])


def ways(model: Any, memory: Any, store: Any) -> dict[str, Callable[[Callable[[], Any]], Any]]:
    """Return how a call of the model is made: as it is, with a memory, with kNN-LM."""
    import mbpa_lm

    knn = KnnLm(
        store, store.column_between("values", 0, len(store))[:, 0].long(), store.column_between("keys", 0, len(store)).numpy()
    )

    def adapted(call: Callable[[], Any], write: Any) -> Any:
        memory.forget()
        with mbpa_lm.adapt(model, memory, write=write):
            return call()

    def with_knn(call: Callable[[], Any]) -> Any:
        hooks = [model.lm_head.register_forward_pre_hook(knn.before), model.lm_head.register_forward_hook(knn.after)]
        try:
            return call()
        finally:
            for hook in hooks:
                hook.remove()

    return {
        "plain": lambda call: call(),
        "reading": lambda call: adapted(call, "nothing"),
        "writing": lambda call: adapted(call, "everything"),
        "kNN-LM": with_knn,
    }


@torch.no_grad()
def measure(size: str, vocabulary: int, entries: int, rounds: int, results: Any) -> None:
    import mbpa_lm
    from mbpa_lm.system.machine import keep_freed_memory, peak_memory_bytes

    keep_freed_memory()
    model = make_model(size, vocabulary)
    text = torch.randint(0, vocabulary, (1, SCORED), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "scoring": (SCORED, lambda: model(text).logits),
        "generation": (
            GENERATED,
            lambda: model.generate(text[:, :PROMPT], attention_mask=torch.ones(1, PROMPT), **settings),
        ),
    }
    found: Row = {"model": size, "vocabulary": vocabulary, "entries": entries, "parameters": model.num_parameters()}
    for _, call in calls.values():
        call()
    found["peak_bytes"] = {"plain": peak_memory_bytes()}
    with tempfile.TemporaryDirectory() as folder:
        fill(mbpa_lm.Memory(model), entries, Path(folder) / "memory")
        memory = mbpa_lm.Memory.load(Path(folder) / "memory", model)
        assert memory._store is not None
        for _, call in calls.values():
            with mbpa_lm.adapt(model, memory, write="everything"):
                call()
        found["peak_bytes"]["memory"] = peak_memory_bytes()
        of_ways = ways(model, memory, memory._store)
        for what, (tokens, call) in calls.items():
            times: dict[str, list[float]] = {name: [] for name in of_ways}
            for number in range(rounds + 1):  # the first is not counted: it loads machine code
                for name, way in of_ways.items():
                    start = time.perf_counter()
                    way(call)
                    if number:
                        times[name].append(time.perf_counter() - start)
            found[what] = {name: tokens / float(np.median(seconds)) for name, seconds in times.items()}
        found["peak_bytes"]["kNN-LM"] = peak_memory_bytes()
    results.put(found)


def main() -> None:
    from mbpa_lm.system.machine import describe_machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    arguments = parser.parse_args()
    sizes, vocabularies, entries = arguments.models, [50_257, 128_000], arguments.entries
    if arguments.quick:
        sizes, vocabularies, entries = ["10M"], [50_257], 10_000
    context, rows = multiprocessing.get_context("spawn"), []
    table = Table(
        "model",
        "vocabulary",
        "what",
        "plain",
        "reading",
        "writing",
        "kNN-LM",
        "reading costs",
        "writing costs",
        "peak GB",
        "with memory",
    )
    for size in sizes:
        for vocabulary in vocabularies:
            results = context.Queue()
            process = context.Process(target=measure, args=(size, vocabulary, entries, arguments.rounds, results))
            process.start()
            row: Row = results.get()
            process.join()
            rows.append(row)
            for what in ("scoring", "generation"):
                speeds = row[what]
                costs = [f"{speeds['plain'] / speeds[name] - 1:+.0%}" for name in ("reading", "writing")]
                peaks = [f"{row['peak_bytes'][name] / 1e9:.2f}" for name in ("plain", "memory")]
                table.add_row(size, f"{vocabulary:,}", what, *(f"{speed:,.1f}" for speed in speeds.values()), *costs, *peaks)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            values = {"machine": describe_machine(torch.device("cpu")), "rows": rows}
            arguments.output.write_text(json.dumps(values, indent=1))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
