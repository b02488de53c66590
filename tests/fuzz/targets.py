"""What a stranger may hand over, one target a parser: a file made from bytes, read as the package reads it.

A target may do anything but end in another error than the package's own. Half of the inputs are bytes as they are; of the JSON
files the other half are valid ones in which some values were replaced. Checksums are made right again: a stranger could too.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mbpa_lm import commands
from mbpa_lm.checkpoint import find_checkpoint, load_checkpoint
from mbpa_lm.data import streams
from mbpa_lm.data.text_files import SplitFiles
from mbpa_lm.data.tokenizers import SentencePieceTokenizer, WordTokenizer, load_tokenizer
from mbpa_lm.errors import MbpaError
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore import manifest as manifests
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.tuned import load_tuned

Read = Callable[[bytes], None]

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 65535, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "..", "../../etc/passwd", "/etc/passwd", "a" * 300, "\x00", "\ud800", "lstm", "transformer", "word", [], [[]], [None], {},
    {"": {}}, ["a"] * 70,
]  # fmt: skip


def edited(values: Any, data: bytes) -> Any:
    """Return JSON values in which a place for every two bytes holds something strange, or something from another place."""
    values = json.loads(json.dumps(values))
    for where, what in zip(data[::2], data[1::2], strict=False):
        places = list(_places(values))
        if not places:
            break
        holder, key = places[where % len(places)]
        other, other_key = places[what % len(places)]
        strange = STRANGE[what % len(STRANGE)] if what < 200 else other[other_key]
        if what == 255 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = json.loads(json.dumps(strange))
    return values


def _places(values: Any) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items):
        yield values, key
        yield from _places(value)


def variants(data: bytes, valid: Any) -> bytes:
    """Return the content of a JSON file: bytes as they are, or a valid one that was edited."""
    if not data or data[0] % 2:
        return data[1:]
    return json.dumps(edited(valid, data[1:9])).encode("utf-8", "surrogatepass")


def tolerant(read: Callable[[], object]) -> None:
    with contextlib.suppress(MbpaError):
        read()


def train_a_model(folder: Path, *more: str) -> Path:
    """Train a model of some hundred weights on a text of some lines, and return its run folder."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        (text / f"{split}.txt").write_text("the cat sat on the mat\nthe dog sat on the cat\n" * 8)
    options = ["--data.corpus", "text", "--data.path", str(text), "--data.token_folder", str(folder / "tokens")]
    options += ["--run.folder", str(folder / "run"), "--tracking.mode", "disabled", "--training.epochs", "1", *more]
    options += ["--training.batch_size", "2", "--training.sequence_length", "5", "--training.precision", "float32"]
    assert commands.train([*options, "--model.hidden_size", "4", "--model.layers", "1"]) == 0
    return folder / "run"


def pointers(folder: Path) -> Read:
    run = train_a_model(folder)
    valid = json.loads((run / "checkpoint.json").read_text())

    def read(data: bytes) -> None:
        (run / "checkpoint.json").write_bytes(variants(data, valid))
        tolerant(lambda: find_checkpoint(run, "last"))

    return read


def checkpoint(folder: Path) -> Read:
    saved = find_checkpoint(train_a_model(folder))
    valid = json.loads((saved / "manifest.json").read_text())
    training = json.loads((saved / "training.json").read_text())

    def read(data: bytes) -> None:
        name, values = ("manifest.json", valid) if not data or data[-1] < 200 else ("training.json", training)
        (saved / name).write_bytes(variants(data[:-1], values))
        tolerant(lambda: load_checkpoint(saved, with_position=True))
        (saved / name).write_text(json.dumps(values))

    return read


def weights(folder: Path) -> Read:
    saved = find_checkpoint(train_a_model(folder))
    valid, manifest = (saved / "model.safetensors").read_bytes(), json.loads((saved / "manifest.json").read_text())

    def read(data: bytes) -> None:
        content = patched(valid, data)
        (saved / "model.safetensors").write_bytes(content)
        manifest["files"]["model.safetensors"] = hashlib.sha256(content).hexdigest()
        (saved / "manifest.json").write_text(json.dumps(manifest))
        tolerant(lambda: load_checkpoint(saved))

    return read


def patched(valid: bytes, data: bytes) -> bytes:
    """Return bytes as they are, or a valid file in which stretches are replaced or which ends early."""
    if not data or data[0] % 4 == 3:
        return data[1:]
    content = bytearray(valid)
    rest = data[1:]
    while len(rest) >= 4 and content:
        at, count = int.from_bytes(rest[:3], "little") % len(content), rest[3] % 9
        content[at : at + count] = rest[4 : 4 + count]
        rest = rest[4 + count :]
    return bytes(content[: len(content) - (data[0] if data[0] % 4 == 2 else 0)])


def words(folder: Path) -> Read:
    WordTokenizer(["<eos>", "<unk>", "cat"]).save(folder)
    (file,) = folder.iterdir()

    def read(data: bytes) -> None:
        file.write_bytes(variants(data, ["<eos>", "<unk>", "cat"]))
        tolerant(lambda: load_tokenizer("word", folder).encode("the cat"))

    return read


def sentencepiece(folder: Path) -> Read:
    run = train_a_model(folder, "--tokenizer.kind", "sentencepiece", "--tokenizer.vocabulary_size", "270")
    file = find_checkpoint(run) / "tokenizer" / "sentencepiece.model"
    valid = file.read_bytes()
    assert isinstance(load_tokenizer("sentencepiece", file.parent), SentencePieceTokenizer)

    def read(data: bytes) -> None:
        file.write_bytes(patched(valid, data))
        tolerant(lambda: load_tokenizer("sentencepiece", file.parent).encode("the cat"))

    return read


def tokens(folder: Path) -> Read:
    train_a_model(folder)
    stream = next((folder / "tokens").glob("*-train-*"))
    valid = json.loads((stream / "manifest.json").read_text())

    def read(data: bytes) -> None:
        (stream / "manifest.json").write_bytes(variants(data, valid))
        tolerant(lambda: streams._read(stream, "text train", 20).documents())

    return read


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
    del valid["checksum"]

    def read(data: bytes) -> None:
        content = variants(data, valid)
        try:
            values = json.loads(content)
            content = json.dumps({**values, "checksum": manifests._checksum(values)}).encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, RecursionError):
            pass
        (memory / manifests.FILE).write_bytes(content)
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
        (memory / manifests.FILE).write_text(json.dumps({**values, "checksum": manifests._checksum(values)}))
        tolerant(lambda: _open_and_search(memory))

    return read


def tuned(folder: Path) -> Read:
    valid = {"format": 1, "settings": {"adaptation": {"alpha": 0.1, "steps": 3}, "memory": {"size": 10}}, "metric": [1.0, 2.0],
             "weights": {"base": 0.5}, "stream": "text valid", "losses": {"base": 1.0}}  # fmt: skip

    def read(data: bytes) -> None:
        (folder / "tuned.json").write_bytes(variants(data, valid))
        tolerant(lambda: load_tuned(folder, 2))

    return read


def config(folder: Path) -> Read:
    path = folder / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        tolerant(lambda: commands._yaml_keys(str(path)))

    return read


def text(folder: Path) -> Read:
    tokenizer = WordTokenizer(["<eos>", "<unk>", "cat"])

    def read(data: bytes) -> None:
        (folder / "test.txt").write_bytes(data)

        def encode() -> None:
            for piece, _ in SplitFiles(folder, r" = [^=\n]+ = ", "text").pieces("test"):
                ids, ends = tokenizer.encode(piece)
                assert len(ids) == len(ends)

        tolerant(encode)

    return read


TARGETS: dict[str, Callable[[Path], Read]] = {
    "pointers": pointers, "checkpoint": checkpoint, "weights": weights, "words": words, "sentencepiece": sentencepiece,
    "tokens": tokens, "datastore": datastore, "index": index, "tuned": tuned, "config": config, "text": text,
}  # fmt: skip


def prepared(name: str, folder: Path) -> Read:
    """Make what a target reads in an empty folder and return how it is read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return TARGETS[name](folder)
