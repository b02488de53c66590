"""evaluate.py --verify: the same without the future, on a run with everything; and a run that is not causal is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from mbpa_lm import commands
from mbpa_lm.data.streams import TokenStream
from mbpa_lm.errors import NumericalError
from mbpa_lm.experts.base import Chunk
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.scoring.documents import Scored
from mbpa_lm.scoring.stream import StreamScores
from mbpa_lm.scoring.verification import verify
from tests.conftest import GPT2

Options = Callable[..., list[str]]
ALL = "base,mbpa,persistent,mbpa+persistent,cache,knn,dynamic"


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--tune"],
        ["--adaptation.solver", "dual", "--mixture.weights.base", "0.5", "--mixture.weights.mbpa", "0.5"],
        ["--memory.write", "surprising", "--memory.eviction", "least_retrieved", "--memory.datastores", "[training]"],
        ["--memory.write", "reservoir", "--memory.size", "100"],
    ],
    ids=" ".join,
)
def test_every_expert_and_mixture_is_the_same_without_its_future(
    options: Options, trained_run: Path, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "trained")  # experts keep things beside the checkpoint
    arguments = ["--checkpoint", str(run), "--experts", ALL, "--verify", "4", "--evaluation.chunk_length", "37", *more]
    assert commands.evaluate(options(tmp_path / "scored", *arguments)) == 0
    metrics = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    assert len(metrics["verified_positions"]) == 4
    assert "the same to the bit without their future" in capsys.readouterr().out


def test_so_it_is_with_a_transformer(options: Options, tmp_path: Path) -> None:
    model = ["--model.kind", "transformer", "--model.context_length", "10", "--model.context_overlap", "4"]
    model += ["--model.settings", json.dumps(GPT2)]
    assert commands.train(options(tmp_path / "run", *model, "--training.epochs", "1")) == 0
    arguments = ["--checkpoint", str(tmp_path / "run"), "--experts", ALL, "--verify", "2"]
    arguments += ["--evaluation.chunk_length", "23", "--evaluation.max_tokens", "200"]
    assert commands.evaluate(options(tmp_path / "scored", *model, *arguments)) == 0


def test_a_prediction_that_knows_its_future_is_found(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = BaseModelExpert.target_log_probabilities

    def peeks(self: BaseModelExpert, chunk: Chunk, targets: Tensor) -> Tensor:
        return honest(self, chunk, targets) - 1e-6 * targets.float().mean()

    monkeypatch.setattr(BaseModelExpert, "target_log_probabilities", peeks)
    arguments = ["--checkpoint", str(trained_run), "--experts", "base", "--verify"]
    assert commands.evaluate(options(tmp_path, *arguments)) == 9
    error = capsys.readouterr().err
    assert error.startswith("error: base gives position ")
    assert "from scratch without its future: it is not causal" in error


def test_a_rounding_is_let_pass_where_one_is_expected_and_told() -> None:
    streams = [TokenStream("text", np.arange(9), np.ones(9, dtype=int), np.ones(9, dtype=int), np.zeros(1, dtype=int))]
    losses = {"base": np.linspace(0, 1, 8, dtype=np.float32)}

    def score(stream: TokenStream, position: int, chunk_length: int) -> Scored:
        again = StreamScores({"base": losses["base"] + np.float32(1e-4)}, {}, np.zeros((0, 0)))
        return Scored(again, {}, None)

    assert verify(streams, [2, 5], losses, score, [4], 9, 0, tolerance=1e-3) == pytest.approx(1e-4, rel=1e-2)
    with pytest.raises(NumericalError, match="base gives position 2 a loss"):
        verify(streams, [2, 5], losses, score, [4], 9, 0)
