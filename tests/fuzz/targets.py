"""What a stranger may hand over, one target a parser: a file made from bytes, read as the package reads it.

A target may do anything but end in another error than the package's own. Half of the inputs are bytes as they are, the other
half valid files that were changed (mutations.py). Checksums are made right again: a stranger could too.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from mbpa_lm import commands
from mbpa_lm.adaptation.slow_weights import SlowRule, SlowWeights
from mbpa_lm.checkpoints import gradient_scale as gradient_scales
from mbpa_lm.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from mbpa_lm.checkpoints.gradient_scale import LAYER_FILE, gradient_scale
from mbpa_lm.checkpoints.scales import FILE as NORM_FILE
from mbpa_lm.checkpoints.scales import mean_squared_norm
from mbpa_lm.checkpoints.tuned import load_tuned
from mbpa_lm.config import PersistentConfig
from mbpa_lm.data import streams
from mbpa_lm.data.text_files import SplitFiles
from mbpa_lm.data.tokenizers import SentencePieceTokenizer, WordTokenizer, load_tokenizer
from mbpa_lm.options import make_parser, parse, yaml_keys
from mbpa_lm.results.page import results_page
from mbpa_lm.results.runs import load_runs
from mbpa_lm.training import train
from tests.fuzz.memories import datastore, entries, index, settings
from tests.fuzz.mutations import Read, patched, signed, tolerant, variants
from tests.integrations.words import save_tokenizer


def options_of(folder: Path, *more: str) -> list[str]:
    """Return the options of a model of some hundred weights that is trained on a text of some lines, which are written."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        (text / f"{split}.txt").write_text("the cat sat on the mat\nthe dog sat on the cat\n" * 8)
    options = ["--data.corpus", "text", "--data.path", str(text), "--data.token_folder", str(folder / "tokens")]
    options += ["--run.folder", str(folder / "run"), "--tracking.mode", "disabled", "--training.epochs", "1"]
    options += ["--training.batch_size", "2", "--training.sequence_length", "5", "--training.precision", "float32"]
    return [*options, "--model.hidden_size", "4", "--model.layers", "1", *more]


def train_a_model(folder: Path, *more: str) -> Path:
    """Train such a model, and return its run folder."""
    assert commands.train(options_of(folder, *more)) == 0
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
        content = variants(data[:-1], values)
        (saved / name).write_bytes(content)
        if name == "training.json":
            (saved / "manifest.json").write_text(json.dumps(with_hash(valid, name, content)))
        tolerant(lambda: load_checkpoint(saved, with_position=True))
        (saved / name).write_text(json.dumps(values))

    return read


def with_hash(manifest: dict[str, Any], name: str, content: bytes) -> dict[str, Any]:
    """Return a checkpoint's manifest that has the hash of a file."""
    return {**manifest, "files": {**manifest["files"], name: hashlib.sha256(content).hexdigest()}}


def weights(folder: Path) -> Read:
    saved = find_checkpoint(train_a_model(folder))
    valid, manifest = (saved / "model.safetensors").read_bytes(), json.loads((saved / "manifest.json").read_text())

    def read(data: bytes) -> None:
        content = patched(valid, data)
        (saved / "model.safetensors").write_bytes(content)
        (saved / "manifest.json").write_text(json.dumps(with_hash(manifest, "model.safetensors", content)))
        tolerant(lambda: load_checkpoint(saved))

    return read


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
        (stream / "manifest.json").write_bytes(signed(variants(data, valid)))
        tolerant(lambda: streams._read(stream, "text train", 20).documents())

    return read


def tuned(folder: Path) -> Read:
    valid = {"format": 1, "settings": {"adaptation": {"alpha": 0.1, "steps": 3}, "memory": {"size": 10}}, "metric": [1.0, 2.0],
             "weights": {"base": 0.5}, "stream": "text valid", "losses": {"base": 1.0}}  # fmt: skip

    def read(data: bytes) -> None:
        (folder / "tuned.json").write_bytes(variants(data, valid))
        tolerant(lambda: load_tuned(folder, 2))

    return read


def state(folder: Path) -> Read:
    """The state of training, from which `--resume` goes on."""
    run, whole = train_a_model(folder), folder / "whole"
    run.rename(whole)
    config, _ = parse(make_parser("train.py", ""), options_of(folder, "--training.epochs", "2"))
    saved = run / "checkpoints" / find_checkpoint(whole, "last").name
    tensors = load_file(whole / "checkpoints" / saved.name / "training.safetensors")
    values, manifest = (
        json.loads((whole / "checkpoints" / saved.name / f"{name}.json").read_text()) for name in ("training", "manifest")
    )
    values["training"]["epochs"] = 2
    manifest = with_hash(manifest, "training.json", json.dumps(values).encode())

    def read(data: bytes) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        (saved / "training.json").write_text(json.dumps(values))
        name, content = "training.json", json.dumps(values).encode()
        if len(data) > 2 and data[0] % 2:  # one tensor less, or one of another size or type
            which = sorted(tensors)[data[1] % len(tensors)]
            changed = dict(tensors)
            changed[which] = changed[which].flatten()[: data[2] % 64].contiguous()
            changed[which] = changed[which].double() if data[2] % 3 else changed[which]
            if data[2] == 255:
                del changed[which]
            name, content = "training.safetensors", save(changed)
        else:
            content = variants(data, values)
        (saved / name).write_bytes(content)
        (saved / "manifest.json").write_text(json.dumps(with_hash(manifest, name, content)))
        tolerant(lambda: train(config, resume=True))

    return read


def scales(folder: Path) -> Read:
    """What is measured once a checkpoint and kept beside it: the norm of hidden states, and gradients."""
    saved = find_checkpoint(train_a_model(folder))
    model = load_checkpoint(saved).model.eval()
    training_tokens, persistent = np.arange(60) % 5, PersistentConfig(interval=5)
    rule = SlowRule(5, 0.1, 0.1, 0.1)

    def measure() -> None:
        assert 0 < mean_squared_norm(saved, model, lambda: training_tokens) < float("inf")
        layer = model.output_layer()
        scale = gradient_scale(saved, model, lambda: training_tokens, persistent)
        slow = SlowWeights(layer.weight, layer.bias, rule, scale)
        slow.learn(torch.zeros(5, 4), slow.log_probabilities(torch.zeros(5, 4))[0], torch.zeros(5, dtype=torch.int64))
        assert bool(torch.isfinite(slow.weight_Vd).all())

    gradient_scales._hash = lambda tensors: ""  # a stranger could make it right, but not a fuzzer
    measure()
    norm, gradients = json.loads((saved / NORM_FILE).read_text()), (saved / LAYER_FILE).read_bytes()

    def read(data: bytes) -> None:
        (saved / NORM_FILE).write_bytes(signed(variants(data, norm)))
        (saved / LAYER_FILE).write_bytes(patched(gradients, data))
        tolerant(measure)

    return read


def huggingface(folder: Path) -> Read:
    """A tokenizer's files of the transformers library."""
    save_tokenizer(folder / "huggingface")
    names = ("tokenizer.json", "tokenizer_config.json")
    valid = {name: json.loads((folder / "huggingface" / name).read_text()) for name in names}

    def read(data: bytes) -> None:
        name = names[data[-1] % 2 if data else 0]
        (folder / "huggingface" / name).write_bytes(variants(data[:-1], valid[name]))
        tolerant(lambda: load_tokenizer("huggingface", folder).encode("w3 w4 w5"))
        (folder / "huggingface" / name).write_text(json.dumps(valid[name]))

    return read


def runs(folder: Path) -> Read:
    """Run folders of evaluate.py, from which a page is written."""
    run = train_a_model(folder)
    scored = options_of(folder, "--checkpoint", str(run), "--experts", "base,cache")
    assert commands.evaluate([*scored, "--run.folder", str(folder / "results" / "scored")]) == 0
    path = folder / "results" / "scored" / "metrics.json"
    valid = json.loads(path.read_text())

    def read(data: bytes) -> None:
        path.write_bytes(variants(data, valid))
        tolerant(lambda: results_page(load_runs(folder / "results"), folder / "results"))

    return read


def config(folder: Path) -> Read:
    path = folder / "config.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        tolerant(lambda: yaml_keys(str(path)))

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
    "state": state, "scales": scales, "huggingface": huggingface, "settings": settings, "entries": entries, "runs": runs,
}  # fmt: skip


def prepared(name: str, folder: Path) -> Read:
    """Make what a target reads in an empty folder and return how it is read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return TARGETS[name](folder)
