"""What goes to Weights & Biases, as its library is called; and the sweeps, as its agent would start them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbpa_lm import commands
from mbpa_lm.options import make_parser, parse

Options = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]


class Recorder:
    """Stands in for a run of wandb and keeps what it is given."""

    id = "abc"

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.artifacts: list[tuple[set[str], list[str]]] = []
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append(values)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append((set(artifact.manifest.entries), aliases))

    def finish(self) -> None: ...


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("wandb.init", lambda **_: recorder)
    return recorder


def test_training_sends_curves_and_checkpoints(options: Options, tmp_path: Path, recorder: Recorder) -> None:
    arguments = ["--tracking.mode", "offline", "--tracking.log_steps", "20"]
    assert commands.train(options(tmp_path / "run", *arguments)) == 0
    wanted = {"train/loss", "train/gradient_norm", "train/learning_rate", "train/tokens_per_second"}
    curve = [values for values in recorder.logged if "epoch" not in values]
    assert len(curve) == 6  # of 136 steps
    assert all(values.keys() == wanted for values in curve)
    assert {"valid/loss", "valid/perplexity", "train/perplexity"} < recorder.logged[-1].keys()
    ((files, aliases),) = recorder.artifacts
    assert {"model.safetensors", "manifest.json", "training.safetensors", "tokenizer/vocabulary.json"} <= files
    assert aliases == ["best", "last"]
    kept = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["train/loss"] for record in kept if "train/loss" in record] == [
        values["train/loss"] for values in recorder.logged
    ]


def test_evaluation_sends_tables(options: Options, trained_run: Path, tmp_path: Path, recorder: Recorder) -> None:
    arguments = ["--checkpoint", str(trained_run), "--evaluation.max_tokens", "80", "--tracking.mode", "offline"]
    assert commands.evaluate(options(tmp_path, *arguments)) == 0
    tables = {name: table for values in recorder.logged for name, table in values.items() if name.startswith("tables/")}
    assert {"tables/experts", "tables/by_training_frequency", "tables/by_recurrence"} < tables.keys()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [row[0] for row in tables["tables/experts"].data] == list(metrics["experts"])
    assert tables["tables/experts"].data[0][1] == metrics["experts"]["base"]["perplexity"]


def test_artifacts_can_be_left_out(options: Options, tmp_path: Path, recorder: Recorder) -> None:
    arguments = ["--tracking.mode", "offline", "--tracking.artifacts", "false", "--training.epochs", "1"]
    assert commands.train(options(tmp_path / "run", *arguments)) == 0
    assert not recorder.artifacts


def value_of(knob: dict[str, Any]) -> Any:
    return knob["values"][0] if "values" in knob else knob["min"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_a_sweep_starts_what_it_is_named_after(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    given = [f"--{name}={value_of(knob)}" for name, knob in sweep["parameters"].items()]
    words = [word for word in sweep["command"] if not re.fullmatch(r"\$\{(env|interpreter|program|args)\}", word)]
    config, _ = parse(make_parser("train.py", ""), [*words, *given])
    assert words == ["--config", f"configs/{path.name}", "--run.folder", f"runs/sweeps/{path.stem}"]
    for name, knob in sweep["parameters"].items():
        section, key, *rest = name.split(".")
        found = getattr(getattr(config, section), key)
        assert (found[rest[0]] if rest else found) == value_of(knob)


def test_runs_of_a_sweep_have_folders_of_their_own(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    for run_id in ("one", "two"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        assert commands.train(options(tmp_path / "sweeps", "--training.epochs", "1")) == 0
        assert (tmp_path / "sweeps" / run_id / "checkpoint.json").is_file()
