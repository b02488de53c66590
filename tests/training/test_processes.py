"""Several processes on one model, launched as a user would launch them, against one process with the whole batch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mbpa_lm import commands
from mbpa_lm.checkpoints.checkpoint import load_checkpoint
from mbpa_lm.config import Config
from mbpa_lm.errors import ConfigError
from mbpa_lm.system.processes import Processes
from mbpa_lm.training.run import check_training
from tests.conftest import GPT2

Options = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]

LSTM = ["--model.layers", "2", "--model.weight_dropout", "0.2", "--training.sampled_words", "20"]
TRANSFORMER = ["--model.kind", "transformer", "--model.context_length", "10", "--model.context_overlap", "4",
               "--model.settings", json.dumps(GPT2), "--training.gradient_norm", "1"]  # fmt: skip
SGD = ["--training.optimizer", "sgd", "--training.learning_rate", "1.0", "--run.device", "cpu"]
"""Adam makes a difference of rounding large where a gradient is zero but for rounding."""


def launch(configuration: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate" / configuration)]
    return subprocess.run(
        [sys.executable, *launcher, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_close(one: Path, two: Path, tolerance: float) -> None:
    first, second = (load_checkpoint(run, "last").model.state_dict() for run in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0)


def validation_losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record["valid/loss"] for record in records if "valid/loss" in record]


def test_two_processes_train_the_same_lstm_as_one(options: Options, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*LSTM, *SGD, "--training.hebbian_limit", "20"]
    assert commands.train(options(one, *arguments)) == 0
    launched = launch("processes.yaml", options(two, *arguments))
    assert launched.returncode == 0, launched.stderr
    assert "on cpu:0, 2 processes together" in launched.stdout or "on cpu, 2 processes together" in launched.stdout
    assert launched.stdout.count("best checkpoint") == 1
    assert_close(one, two, 2e-6)
    assert validation_losses(two) == pytest.approx(validation_losses(one), abs=1e-6)


def test_one_process_goes_on_where_two_stopped(options: Options, tmp_path: Path) -> None:
    """With the recurrent state of all rows, and from inside an epoch."""
    whole, shorter = tmp_path / "whole", tmp_path / "shorter"
    arguments = [*LSTM, *SGD, "--training.save_steps", "7"]
    assert commands.train(options(whole, *arguments)) == 0
    stop_early(options, shorter, arguments)
    assert commands.train(options(shorter, *arguments, "--resume")) == 0
    assert_close(whole, shorter, 2e-6)


def stop_early(options: Options, run: Path, arguments: list[str], **environment: str) -> None:
    """Train with two processes and have SIGTERM sent to one of them at a step inside the second epoch."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from mbpa_lm import commands
from mbpa_lm.training.run import TrainingRun
step = TrainingRun._step
def stopped(run, *batch):
    if run.position.step == 85 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return step(run, *batch)
TrainingRun._step = stopped
raise SystemExit(commands.train(sys.argv[1:]))
"""
    path = run.parent / "stopped.py"
    path.write_text(script)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(path), *options(run, *arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "stopped by SIGTERM at step 86 of 136, saved" in launched.stderr


def test_sharded_weights_are_those_of_one_process_and_go_on(options: Options, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*TRANSFORMER, *SGD]
    assert commands.train(options(one, *arguments)) == 0
    stop_early(options, two, arguments, ACCELERATE_USE_FSDP="true")
    launched = launch("fsdp.yaml", options(two, *arguments, "--resume"))
    assert launched.returncode == 0, launched.stderr
    assert_close(one, two, 2e-6)


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("cpu")
    monkeypatch.setattr(processes, "count", 3)
    with pytest.raises(ConfigError, match=r"^training.batch_size 32 cannot be shared equally by 3 processes$"):
        check_training(Config(), processes)


def test_what_needs_whole_weights_is_refused_where_they_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("cpu")
    monkeypatch.setattr(processes, "count", 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"^model.kind lstm needs whole weights in every process; launch without FSDP$"):
        check_training(Config(), processes)
