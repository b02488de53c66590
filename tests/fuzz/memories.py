"""Targets: what lies in the folder of a memory."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mbpa_lm.adaptation import restricted
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.integrations.memory import SETTINGS, Memory
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore import manifest as manifests
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.system.durable import sealed
from tests.fuzz.mutations import Read, patched, signed, tolerant, variants


def _a_datastore(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(600, 4, generator=generator)
    likely = torch.zeros(600, 2, dtype=torch.int32), torch.full((600, 2), 0.1)
    store = Datastore.create(folder / "memory", Identity("model", "tokenizer"), Layout(4, 2, "float16"))
    store.add(Entries(keys, torch.arange(600), torch.zeros(600), *likely), torch.zeros(600, dtype=torch.int64))
    store.build_index("hnsw")
    store.close()
    return folder / "memory"


def _open_and_search(folder: Path) -> None:
    store = Datastore.open(folder)
    store.search(torch.zeros(1, store.manifest.layout.hidden_size), 3)


def datastore(folder: Path) -> Read:
    memory = _a_datastore(folder)
    valid = json.loads((memory / manifests.FILE).read_text())

    def read(data: bytes) -> None:
        (memory / manifests.FILE).write_bytes(signed(variants(data, valid)))
        tolerant(lambda: _open_and_search(memory))

    return read


def index(folder: Path) -> Read:
    memory = _a_datastore(folder)
    values = json.loads((memory / manifests.FILE).read_text())
    del values["checksum"]
    file = memory / values["index"]["file"]
    valid = file.read_bytes()

    def read(data: bytes) -> None:
        content = patched(valid, data)
        file.write_bytes(content)
        values["index"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (memory / manifests.FILE).write_text(json.dumps(sealed(values)))
        tolerant(lambda: _open_and_search(memory))

    return read


def entries(folder: Path) -> Read:
    """The entries themselves, searched and adapted to."""
    memory, V = _a_datastore(folder), 600
    values = json.loads((memory / manifests.FILE).read_text())
    del values["checksum"]
    columns = {name: (memory / name).read_bytes() for name, digests in values["checksums"].items() if digests}
    queries, weight_Vd = torch.zeros(1, 4), torch.ones(V, 4)

    def search_and_adapt() -> None:
        found = Datastore.open(memory, vocabulary_size=V).search(queries, 300)
        kept = found.entries
        base = BaseSoftmax(torch.full((1, V), -6.4), kept.log_partitions, kept.likely_words, kept.likely_probabilities.float())
        solved = (weight_Vd, None, kept.keys.float(), kept.values, torch.full((1, 300), 1 / 300), queries, base)
        restricted.solve(Problem(*solved), AdaptationRule(2, 0.1))

    def read(data: bytes) -> None:
        name = sorted(columns)[data[-1] % len(columns) if data else 0]
        content = patched(columns[name], data[:-1]).ljust(len(columns[name]), b"\xff")[: len(columns[name])]
        (memory / name).write_bytes(content)
        digests = values["checksums"] | {name: [hashlib.sha256(content).hexdigest()]}
        (memory / manifests.FILE).write_text(json.dumps(sealed(values | {"checksums": digests})))
        (memory / "unchanged.json").unlink(missing_ok=True)
        tolerant(search_and_adapt)
        (memory / name).write_bytes(columns[name])

    return read


def settings(folder: Path) -> Read:
    """What `Memory.save` keeps beside the entries."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=16)).eval()
    memory = Memory(model, neighbours=2)
    memory.add_documents([list(range(15))])
    memory.save(folder / "memory")
    path = folder / "memory" / SETTINGS
    valid = json.loads(path.read_text())

    def load_and_ask() -> None:
        loaded = Memory.load(folder / "memory", model)
        assert loaded.expert.neighbours >= loaded.neighbours > 0

    def read(data: bytes) -> None:
        path.write_bytes(signed(variants(data, valid)))
        tolerant(load_and_ask)

    return read
