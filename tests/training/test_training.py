"""Training on a small text: it learns, and however it is interrupted it ends where an uninterrupted run ends."""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mbpa_lm import commands
from mbpa_lm.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from mbpa_lm.training.run import TrainingRun
from tests.conftest import GPT2

Options = Callable[..., list[str]]

RECIPES: dict[str, list[str]] = {
    "lstm": ["--model.weight_dropout", "0.2", "--model.activation_penalty", "1.0"],
    "sampled softmax": ["--training.sampled_words", "20"],
    "hebbian softmax": ["--training.hebbian_limit", "20"],
    "asgd": ["--training.optimizer", "asgd", "--training.schedule", "constant", "--training.averaging_patience", "0",
             "--training.learning_rate", "5.0", "--training.epochs", "4"],
    "transformer": ["--model.kind", "transformer", "--model.context_length", "10", "--model.context_overlap", "4",
                    "--model.settings", json.dumps({**GPT2, "resid_pdrop": 0.1})],
}  # fmt: skip


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run, "last").model.state_dict()


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = last_weights(one), last_weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns(options: Options, tmp_path: Path, recipe: str) -> None:
    assert commands.train(options(tmp_path / "run", *RECIPES[recipe], "--training.epochs", "4")) == 0
    epochs = [record for record in records(tmp_path / "run") if "epoch" in record]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    assert epochs[-1]["valid/perplexity"] < epochs[0]["valid/perplexity"] < 110  # the vocabulary has about a hundred words


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    options: Options, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = [*RECIPES[recipe], "--training.save_steps", "7"]
    assert commands.train(options(whole, *arguments)) == 0
    original = TrainingRun._step
    for stop_at in (31, 85, *((150, 230) if recipe == "asgd" else ())):  # an epoch has 68 steps

        def interrupted(run: TrainingRun, *batch: object, stop_at: int = stop_at) -> float:
            if run.position.step == stop_at:
                raise KeyboardInterrupt
            return original(run, *batch)

        monkeypatch.setattr(TrainingRun, "_step", interrupted)
        assert commands.train(options(broken, *arguments, "--resume")) == commands.INTERRUPTED
        assert "interrupted; what was saved before is whole" in capsys.readouterr().err
    monkeypatch.setattr(TrainingRun, "_step", original)
    assert commands.train(options(broken, *arguments, "--resume")) == 0
    assert_same_weights(whole, broken)
    best = [find_checkpoint(run).name for run in (whole, broken)]
    assert best[0] == best[1]


def _train(arguments: list[str]) -> None:
    raise SystemExit(commands.train(arguments))


def _times_saved(run: Path) -> float:
    pointer = run / "checkpoint.json"
    return pointer.stat().st_mtime_ns if pointer.exists() else 0


KILLS = int(os.environ.get("MBPA_KILLS", "2"))


def test_wherever_a_run_is_killed_it_ends_with_the_weights_of_one_that_never_was(options: Options, tmp_path: Path) -> None:
    """At random moments, of which saving a checkpoint is a large part."""
    whole, killed, generator = tmp_path / "whole", tmp_path / "killed", random.Random(KILLS)
    arguments = ["--training.save_steps", "5", "--training.epochs", str(4 + KILLS // 2), "--run.threads", "1"]
    assert commands.train(options(whole, *arguments)) == 0
    context = multiprocessing.get_context("forkserver")  # it has imported everything, and never run anything
    context.set_forkserver_preload([__name__])
    points = []
    for _ in range(KILLS):
        process = context.Process(target=_train, args=(options(killed, *arguments, "--resume"),), daemon=True)
        process.start()
        assert process.pid is not None
        for _ in range(generator.randint(1, 6)):
            before, deadline = _times_saved(killed), time.monotonic() + 120
            while _times_saved(killed) == before and process.is_alive():
                assert time.monotonic() < deadline, "nothing is saved"
                time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        points.append(find_checkpoint(killed, "last").name)
    assert points == sorted(points)
    assert len(set(points)) > len(points) // 2
    assert commands.train(options(killed, *arguments, "--resume")) == 0
    assert_same_weights(whole, killed)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(options: Options, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["--training.epochs", "8", "--training.save_steps", "20"]
    command = [sys.executable, "train.py", *options(stopped, *arguments)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while not (stopped / "checkpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    error = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 143
    found = re.fullmatch(r"error: stopped by SIGTERM at step ([\d,]+) of 544, saved; go on with --resume", error)
    assert found is not None
    assert find_checkpoint(stopped, "last").name == f"step-{int(found[1].replace(',', '')):06d}"
    assert commands.train(options(whole, *arguments)) == 0
    assert commands.train(options(stopped, *arguments, "--resume", "auto")) == 0
    assert_same_weights(whole, stopped)


def test_a_step_is_saved_once_where_it_is_due_and_the_last(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, save, step = [], TrainingRun._save, TrainingRun._step

    def note(run: TrainingRun, is_best: bool) -> None:
        saved.append(run.position.step)
        save(run, is_best)

    def terminate(run: TrainingRun, *batch: object) -> float:
        if run.position.step == 13:
            signal.raise_signal(signal.SIGTERM)
        return step(run, *batch)

    monkeypatch.setattr(TrainingRun, "_save", note)
    monkeypatch.setattr(TrainingRun, "_step", terminate)
    assert commands.train(options(tmp_path / "run", "--training.save_steps", "7")) == 143
    assert "stopped by SIGTERM at step 14 of 136, saved; go on with --resume" in capsys.readouterr().err
    assert saved == [7, 14]


def test_a_finished_run_stays_as_it_is(options: Options, trained_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained_run, tmp_path / "run")
    before = last_weights(trained_run)
    assert commands.train(options(tmp_path / "run", "--resume")) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in last_weights(tmp_path / "run").items())


def test_a_folder_with_a_run_is_not_overwritten(
    options: Options, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.train(options(trained_run)) == 2
    assert f"run.folder {trained_run} already holds a run; add --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--training.learning_rate", "0.02"], "was trained with training.learning_rate 0.01, the configuration says 0.02"),
        (["--run.seed", "5"], "was trained with run.seed 1, the configuration says 5"),
        (["--training.precision", "bfloat16"], "was trained with training.precision 'float32'"),
        (["--model.hidden_size", "24"], "model.hidden_size is 16 there and 24 in the configuration"),
        (["--tokenizer.min_count", "2"], "tokenizer.min_count is 1 there and 2 in the configuration"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    options: Options, trained_run: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert commands.train(options(trained_run, "--resume", *change)) == 4
    assert message in capsys.readouterr().err


def test_training_stops_early_when_validation_stalls(options: Options, tmp_path: Path) -> None:
    arguments = ["--training.epochs", "30", "--training.patience", "2", "--training.learning_rate", "0.1"]
    assert commands.train(options(tmp_path / "run", *arguments)) == 0
    losses = [record["valid/loss"] for record in records(tmp_path / "run") if "valid/loss" in record]
    assert len(losses) < 30
    assert losses.index(min(losses)) == len(losses) - 3


def test_divergence_is_reported_and_the_last_checkpoint_kept(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TrainingRun._step
    monkeypatch.setattr(
        TrainingRun, "_step", lambda run, *batch: math.nan if run.position.step == 70 else original(run, *batch)
    )
    assert commands.train(options(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "training diverged at step 70: the loss is nan at learning rate" in error
    assert "in another run.folder with a lower training.learning_rate" in error
    assert load_checkpoint(tmp_path / "run").folder.name == "step-000068"


def test_bfloat16_learns_too_or_is_refused(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = commands.train(options(tmp_path / "run", "--training.precision", "bfloat16"))
    if code == 2:
        message = "training.precision is bfloat16, which this processor cannot run the model in; use auto or float32"
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        return
    assert code == 0
    assert records(tmp_path / "run")[-1]["best/perplexity"] < 110
    assert next(iter(last_weights(tmp_path / "run").values())).dtype == torch.float32
