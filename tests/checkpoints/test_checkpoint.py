"""A checkpoint is whole or it is not there, and what is not the model that was saved is refused by name."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mbpa_lm import commands
from mbpa_lm.checkpoints import checkpoint
from mbpa_lm.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from mbpa_lm.errors import CheckpointError
from mbpa_lm.options import make_parser, parse
from mbpa_lm.system.durable import file_hash

Options = Callable[..., list[str]]


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may damage."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def rewrite_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def rewrite_training(folder: Path, values: object) -> None:
    (folder / "training.json").write_text(json.dumps(values))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    rewrite_manifest(folder, files={**files, "training.json": file_hash(folder / "training.json")})


def test_a_checkpoint_is_safetensors_and_json_only(run: Path) -> None:
    suffixes = {path.suffix for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_others_may_read_what_others_could_read_of_any_new_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    rights = (tmp_path / "new").stat().st_mode
    for file in (file for file in (run / "checkpoints").rglob("*") if file.is_file()):
        assert file.stat().st_mode == rights, file


def test_only_the_best_and_the_last_are_kept(options: Options, tmp_path: Path) -> None:
    assert commands.train(options(tmp_path / "run", "--training.epochs", "4", "--training.save_steps", "11")) == 0
    pointers = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == set(pointers.values())


def test_tied_weights_are_saved_once_and_tied_again(run: Path) -> None:
    names = set(load_file(find_checkpoint(run) / "model.safetensors"))
    assert "embedding.weight" in names
    assert "output.weight" not in names
    model = load_checkpoint(run).model
    assert model.output_layer().weight is model.embedding.weight


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def change_a_word(folder: Path) -> None:
    words = json.loads((folder / "tokenizer" / "vocabulary.json").read_text())
    words[5] += "s"
    (folder / "tokenizer" / "vocabulary.json").write_text(json.dumps(words))


def other_weights(folder: Path) -> None:
    replace_embedding(folder, lambda weight: torch.zeros(3, 4))


def turned_weights(folder: Path) -> None:
    replace_embedding(folder, lambda weight: weight.T.contiguous())


def replace_embedding(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["embedding.weight"] = change(tensors["embedding.weight"])
    save_file(tensors, folder / "model.safetensors")
    hashes = {name: file_hash(folder / name) for name in ("model.safetensors",)}
    rewrite_manifest(folder, files=hashes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"model\.safetensors is damaged: its content is not what was saved"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is damaged or incomplete: model.safetensors: No such file"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"has no readable manifest\.json"),
        (lambda folder: rewrite_manifest(folder, format=99), "has format 99; this version reads 1"),
        (lambda folder: rewrite_manifest(folder, model={"kind": "rnn9"}), "damaged or incomplete"),
        (change_a_word, r"the tokenizer in .* is [0-9a-f]{12}, but the model was trained with [0-9a-f]{12}"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "the tokenizer in .* cannot be read"),
        (other_weights, "the configuration is of a model of [0-9,]+ weights, but there are [0-9,]+"),
        (turned_weights, r"of another model: embedding\.weight is \(16, \d+\), not \(\d+, 16\)"),
    ],
)
def test_damage_is_reported_in_one_line(run: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(find_checkpoint(run))
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(run)
    assert "\n" not in str(error.value)


def test_a_damaged_training_state_is_refused_and_the_model_still_loads(
    options: Options, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = find_checkpoint(run, "last")
    values = json.loads((last / "training.json").read_text())
    values["position"]["step"] -= 1
    (last / "training.json").write_text(json.dumps(values))
    assert commands.train(options(run, "--resume", "--training.epochs", "2")) == 4
    assert "training.json is damaged: its content is not what was saved; put its files back" in capsys.readouterr().err
    load_checkpoint(run)
    del values["optimizer"]
    rewrite_training(last, values)
    assert commands.train(options(run, "--resume", "--training.epochs", "2")) == 4
    assert "cannot be resumed: its training state is damaged" in capsys.readouterr().err
    load_checkpoint(run)


def test_checkpoints_without_their_pointer_are_found_and_not_trained_over(
    options: Options, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pointers = {which: find_checkpoint(run, which) for which in ("best", "last")}
    (run / "checkpoint.json").unlink()
    assert pointers == {which: find_checkpoint(run, which) for which in ("best", "last")}
    assert commands.train(options(run)) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err
    assert commands.train(options(run, "--resume")) == 0
    assert "no checkpoint" not in capsys.readouterr().out


def test_a_checkpoint_that_nothing_names_yet_is_gone_on_from(options: Options, run: Path) -> None:
    """The process was killed between its renaming and its pointer's."""
    last = find_checkpoint(run, "last")
    for folder in (run / "checkpoints").iterdir():
        if folder != last:
            shutil.rmtree(folder)
    (run / "checkpoint.json").unlink()
    assert commands.train(options(run, "--resume")) == 0


def test_a_folder_without_a_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; give a run folder that train\.py wrote"):
        load_checkpoint(tmp_path)


def test_a_pointer_that_names_nothing_is_damaged(options: Options, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint.json").write_text("{}")
    assert commands.train(options(run)) == 4
    assert "checkpoint.json cannot be read: it does not name checkpoints; delete it" in capsys.readouterr().err


def test_a_pointer_leads_nowhere_outside_the_run(run: Path) -> None:
    (run / "checkpoint.json").write_text(json.dumps({"best": "../../../etc", "last": "../../../etc"}))
    with pytest.raises(CheckpointError, match="cannot be read: it does not name checkpoints"):
        find_checkpoint(run)


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_half_written(options: Options, run: Path) -> None:
    """The operating system refuses to write files as long as a checkpoint's, as it does when a disk is full."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.jsonl"}
    limit = (find_checkpoint(run) / "model.safetensors").stat().st_size // 2
    arguments = options(run, "--resume", "--training.epochs", "2")
    manifest = find_checkpoint(run, "last") / "training.json"
    values = json.loads(manifest.read_text())
    values["position"]["step"] -= 30  # so that there is something left to train
    rewrite_training(manifest.parent, values)
    before |= {path: path.read_bytes() for path in manifest.parent.glob("*.json")}
    process = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 4
    assert process.stderr.startswith("error: could not save ")
    assert "the previous checkpoint step-" in process.stderr
    assert process.stderr.count("\n") == 1
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.jsonl"}
    assert after == before
    load_checkpoint(run)


@pytest.mark.parametrize("call", ["save_tensors", "write_json", "replace_json", "sync"])
def test_whatever_write_fails_the_run_loads_as_before(
    options: Options, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert commands.train(options(run, "--training.epochs", "1")) == 0
    weights = {name: tensor.clone() for name, tensor in load_checkpoint(run).model.state_dict().items()}

    def fails(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    loaded = load_checkpoint(run, "last", with_position=True)
    monkeypatch.setattr(checkpoint, call, fails)
    config = parse(make_parser("train.py", ""), options(run))[0]
    with pytest.raises(CheckpointError, match=r"could not save .*: No space left on device; the previous checkpoint step-"):
        checkpoint.save_checkpoint(
            config,
            999,
            checkpoint.distinct_weights(loaded.model),
            loaded.tokenizer,
            loaded.token_counts,
            loaded.corpus,
            loaded.position,
            True,
        )
    monkeypatch.undo()
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_checkpoint(run).model.state_dict().items())
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
