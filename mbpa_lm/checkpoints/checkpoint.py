"""Checkpoints: a trained model with its tokenizer, and what training needs to go on. safetensors and JSON only.

    RUN/checkpoint.json               {"best": "step-00012", "last": "step-00014"}
    RUN/checkpoints/step-00014/
        manifest.json                 what it is: configuration, fingerprints, sizes and hashes of the files
        model.safetensors             the weights, and how often each token occurred in training
        tokenizer/                    the tokenizer's own files
        training.safetensors, .json   optimizer, random state and position (in the last one)

A checkpoint is written to a temporary folder, synced and renamed; then the pointer file is replaced. Whatever
happens in between, the previous checkpoint is whole.
"""

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mbpa_lm.config import Config, ModelConfig
from mbpa_lm.config.checks import check_types
from mbpa_lm.data.tokenizers import Tokenizer, load_tokenizer
from mbpa_lm.errors import DAMAGES, CheckpointError, ConfigError, reason
from mbpa_lm.models.build import Model, build_model, check_sizes
from mbpa_lm.system.durable import file_hash, read_json, replace_json, sync, write_json
from mbpa_lm.system.tensor_files import save_tensors

FORMAT = 1
NAME, SAVING = re.compile(r"step-\d+"), ".saving-"
POINTER = "checkpoint.json"
ADVICE = "put its files back from a copy, or train again in another run.folder"
COUNTS = "training_token_counts"
WEIGHTS, STATE = "model.safetensors", ("training.safetensors", "training.json")


@dataclass(frozen=True)
class TrainingPosition:
    """What training needs to go on as if it had never stopped."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    folder: Path
    model: Model
    tokenizer: Tokenizer
    token_counts: Tensor  # (V,) int64: occurrences in the training text
    corpus: dict[str, str]  # name, and the fingerprints of its training and validation text
    fingerprint: str  # of the weights
    position: TrainingPosition | None


def save_checkpoint(
    config: Config,
    step: int,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    token_counts: Tensor,
    corpus: dict[str, str],
    position: TrainingPosition,
    is_best: bool,
) -> Path:
    """Write a checkpoint and point to it; older ones that nothing points to are removed.

    `weights` are those of the model under the names that `distinct_weights` gives. Raises CheckpointError where it cannot be
    written; the previous checkpoint is then untouched.
    """
    run_folder = Path(config.run.folder)
    target = run_folder / "checkpoints" / f"step-{step:06d}"
    pointers = _read_pointers(run_folder)
    with _report_failure(target, pointers.get("last")):
        if target.parent.is_symlink():
            raise CheckpointError(f"{target.parent} is a link; checkpoints lie in their run folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=SAVING, dir=target.parent))
        temporary.chmod(0o755)  # a checkpoint is for others to read too
        try:
            save_tensors({**weights, COUNTS: token_counts}, temporary / WEIGHTS)
            save_tensors(position.tensors, temporary / "training.safetensors")
            write_json(temporary / "training.json", position.values)
            (temporary / "tokenizer").mkdir()
            tokenizer.save(temporary / "tokenizer")
            manifest = {
                "format": FORMAT,
                "step": step,
                "model": dataclasses.asdict(config.model),
                "vocabulary_size": tokenizer.vocabulary_size,
                "tokenizer": {
                    "kind": tokenizer.kind,
                    "fingerprint": tokenizer.fingerprint(),
                    "settings": dataclasses.asdict(config.tokenizer),
                },
                "corpus": corpus,
                "files": {name: file_hash(temporary / name) for name in (WEIGHTS, *STATE)},
            }
            write_json(temporary / "manifest.json", manifest)
            for file in temporary.rglob("*"):
                sync(file)
            shutil.rmtree(target, ignore_errors=True)  # only ever one that no pointer names: a step is saved once
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        pointers = {"best": target.name if is_best else pointers.get("best", target.name), "last": target.name}
        replace_json(run_folder / POINTER, pointers)
    for folder in target.parent.iterdir():
        if folder.name not in pointers.values() and (NAME.fullmatch(folder.name) or folder.name.startswith(SAVING)):
            shutil.rmtree(folder, ignore_errors=True)
    return target


def load_checkpoint(path: Path, which: str = "best", with_position: bool = False) -> Checkpoint:
    """Load a checkpoint folder, or the best or last one of a run folder.

    Raises CheckpointError where there is none, or where it is damaged.
    """
    folder = find_checkpoint(path, which)
    manifest = _read_manifest(folder)
    try:
        for name, expected in manifest["files"].items():
            if (with_position or name not in STATE) and file_hash(folder / name) != expected:
                raise CheckpointError(f"{folder / name} is damaged: its content is not what was saved; {ADVICE}")
        tokenizer = load_tokenizer(manifest["tokenizer"]["kind"], folder / "tokenizer")
        found, wanted = tokenizer.fingerprint(), manifest["tokenizer"]["fingerprint"]
        if found != wanted:
            raise CheckpointError(
                f"the tokenizer in {folder} is {found[:12]}, but the model was trained with {wanted[:12]}; "
                f"put the tokenizer's own files back"
            )
        tensors = load_file(folder / WEIGHTS)
        counts = tensors.pop(COUNTS)
        model_config = ModelConfig(**manifest["model"])
        check_sizes(model_config, manifest["vocabulary_size"], tensors.values())
        model = build_model(model_config, manifest["vocabulary_size"])
        _load_weights(model, tensors)
        position = None
        if with_position:
            values = read_json(folder / "training.json")
            parts = ("position", "optimizer", "training")
            if not isinstance(values, dict) or "seed" not in values or not all(isinstance(values.get(x), dict) for x in parts):
                raise CheckpointError(f"{folder} cannot be resumed: its training state is damaged (training.json lacks a part)")
            position = TrainingPosition(load_file(folder / "training.safetensors"), values)
        return Checkpoint(folder, model, tokenizer, counts, manifest["corpus"], manifest["files"][WEIGHTS], position)
    except (*DAMAGES, RuntimeError, SafetensorError, ConfigError) as error:
        where = f"{Path(error.filename).name}: " if isinstance(error, OSError) and error.filename else ""
        raise CheckpointError(f"checkpoint {folder} is damaged or incomplete: {where}{reason(error)}; {ADVICE}") from None


def find_checkpoint(path: Path, which: str = "best") -> Path:
    """Return the checkpoint folder that `path` means; a run folder means its best or last one."""
    try:
        if (path / "manifest.json").is_file():
            return path
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    name = _read_pointers(path).get(which)
    if name is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder that train.py wrote, or one of its checkpoints")
    return path / "checkpoints" / Path(name).name


def has_checkpoint(run_folder: Path) -> bool:
    """Say whether a run folder holds a checkpoint to go on from."""
    return last_checkpoint(run_folder) is not None


def last_checkpoint(run_folder: Path) -> str | None:
    """Return the name of the last checkpoint of a run, None before the first."""
    return _read_pointers(run_folder).get("last")


def training_record(folder: Path) -> dict[str, Any]:
    """Return how a checkpoint was trained: seed, settings, steps, seconds, best loss and command, as far as its folder says."""
    try:
        values = read_json(folder / "training.json")
        position = values["position"]
        record = {key: values[key] for key in ("seed", "training", "command", "commit", "machine") if key in values}
        return {**record, **{key: position[key] for key in ("step", "seconds", "best_loss") if key in position}}
    except DAMAGES:
        return {}


def check_same_settings(folder: Path, config: Config) -> None:
    """Refuse a checkpoint of another model or tokenizer than configured, naming the first setting that differs."""
    manifest = _read_manifest(folder)
    saved_sections = {"model": manifest["model"], "tokenizer": manifest["tokenizer"]["settings"]}
    for section, saved in saved_sections.items():
        for name, wanted in dataclasses.asdict(getattr(config, section)).items():
            if saved.get(name) != wanted:
                raise CheckpointError(
                    f"checkpoint {folder} holds another {section}: {section}.{name} is {saved.get(name)!r} there and "
                    f"{wanted!r} in the configuration; use the configuration it was trained with"
                )


def with_saved_settings(config: Config, folder: Path, given: Collection[str]) -> Config:
    """Return the configuration with a checkpoint's own model and tokenizer, but for keys whose values were given.

    Raises CheckpointError where its manifest is damaged.
    """
    manifest = _read_manifest(folder)
    try:
        sections: dict[str, Any] = {}
        for section, saved in (("model", manifest["model"]), ("tokenizer", manifest["tokenizer"]["settings"])):
            present = getattr(config, section)
            check_types(type(present), saved)
            was_given = {key.split(".")[1] for key in given if key.startswith(f"{section}.")}
            values = {name: value for name, value in saved.items() if name not in was_given}
            sections[section] = dataclasses.replace(present, **values)
        model = sections["model"]
        if model.kind == "transformer":  # whose blocks a section of their own names again, for training
            sections["training"] = dataclasses.replace(config.training, sequence_length=model.context_length)
        return dataclasses.replace(config, **sections)
    except (*DAMAGES, ConfigError) as error:
        raise CheckpointError(f"checkpoint {folder} does not go with the configuration: {reason(error)}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / "manifest.json")
        if "layout" in manifest:
            raise CheckpointError(f"{folder} is a memory, not a checkpoint; name it in memory.datastores")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {folder} has format {manifest['format']}; this version reads {FORMAT}")
        for key in ("model", "tokenizer", "vocabulary_size", "corpus", "files"):
            manifest[key]
        manifest["tokenizer"]["settings"]
        return dict(manifest)
    except DAMAGES as error:
        raise CheckpointError(f"checkpoint {folder} has no readable manifest.json ({reason(error)}); {ADVICE}") from None


def _read_pointers(run_folder: Path) -> dict[str, str]:
    try:
        pointers = dict(read_json(run_folder / POINTER))
        names = (pointers.get("best"), pointers.get("last"))
        if not all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
            raise ValueError("it does not name checkpoints")
        return pointers
    except (FileNotFoundError, NotADirectoryError):
        return _pointers_without_file(run_folder)
    except DAMAGES as error:
        advice = "delete it: without it, the last checkpoint is the last that is there"
        raise CheckpointError(f"{run_folder / POINTER} cannot be read: {reason(error)}; {advice}") from None


def _pointers_without_file(run_folder: Path) -> dict[str, str]:
    """Return what the checkpoints themselves say: only the best and the last stay, and the best is not after the last."""
    try:
        found = [folder for folder in (run_folder / "checkpoints").iterdir() if NAME.fullmatch(folder.name)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    whole = sorted((folder.name for folder in found if (folder / "manifest.json").is_file()), key=lambda name: int(name[5:]))
    return {"best": whole[0], "last": whole[-1]} if whole else {}


def distinct_weights(model: Model) -> dict[str, Tensor]:
    """Return the state of a model with every shared tensor once, under its first name."""
    distinct: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            distinct[name] = tensor.detach().cpu().contiguous()
    return distinct


def _load_weights(model: Model, tensors: dict[str, Tensor]) -> None:
    expected = distinct_weights(model)
    if expected.keys() != tensors.keys():
        names = sorted(expected.keys() ^ tensors.keys())
        raise CheckpointError(f"the weights are of another model: {names[0]} is in one and not in the other")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"the weights are of another model: {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            )
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name in tensors:
                target.copy_(tensors[name])


@contextmanager
def _report_failure(target: Path, previous: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = f"; the previous checkpoint {previous} is untouched, free some space and go on with --resume"
        raise CheckpointError(f"could not save {target}: {reason(error)}{kept if previous else ''}") from None
