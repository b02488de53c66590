"""evaluate.py --tune, what it keeps with the checkpoint, and how evaluation uses it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mbpa_lm import commands
from mbpa_lm.fitted import FILE

Options = Callable[..., list[str]]


@pytest.fixture
def own_run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the small trained run, for tests that write into it."""
    return Path(shutil.copytree(trained_run, tmp_path / "own"))


def evaluate(options: Options, checkpoint: Path, run: Path, *more: str) -> dict:
    arguments = ["--checkpoint", str(checkpoint), "--experts", "base,mbpa", "--memory.neighbours", "8", *more]
    assert commands.evaluate(options(run, *arguments)) == 0
    return json.loads((run / "metrics.json").read_text())


def kept_file(run: Path) -> Path:
    (folder,) = (run / "checkpoints").iterdir()
    return folder / FILE


def test_tuning_is_kept_reported_and_used(
    options: Options, own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configured = evaluate(options, own_run, tmp_path / "a")
    assert configured["fitted_on"] is None
    tuned = evaluate(options, own_run, tmp_path / "b", "--tune")
    shown = capsys.readouterr().out
    for text in ("adaptation fitted on", "best grid point", "configured", "as fitted on"):
        assert text in shown
    losses = tuned["fitted_on"]["losses"]
    assert losses["fitted"] <= losses["best_grid_point"]
    assert losses["fitted"] < losses["base"]
    assert tuned["config"]["adaptation"]["weighting"] == "within_reach"
    again = evaluate(options, own_run, tmp_path / "c")
    assert again["experts"]["mbpa"]["perplexity"] == tuned["experts"]["mbpa"]["perplexity"]
    assert again["experts"]["mbpa"]["perplexity"] != configured["experts"]["mbpa"]["perplexity"]
    aside = evaluate(options, own_run, tmp_path / "d", "--adaptation.fitted", "false")
    assert aside["experts"]["mbpa"]["perplexity"] == configured["experts"]["mbpa"]["perplexity"]


def test_tuning_never_reads_the_test_text(options: Options, own_run: Path, tmp_path: Path) -> None:
    evaluate(options, own_run, tmp_path / "a", "--tune")
    first = json.loads(kept_file(own_run).read_text())
    arguments = options(tmp_path / "b")
    corpus = tmp_path / "corpus"
    shutil.copytree(arguments[arguments.index("--data.path") + 1], corpus)
    (corpus / "test.txt").write_text("quite another text\n" * 50)
    evaluate(options, own_run, tmp_path / "b", "--tune", "--data.path", str(corpus))
    assert json.loads(kept_file(own_run).read_text()) == {**first, "stream": "corpus valid"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "its format is not 1"),
        ({"metric": [1.0]}, "its metric is not 16 positive numbers"),
        ({"alpha": -1.0}, "adaptation.alpha is -1.0"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_kept_file_that_cannot_be_used_is_refused(
    options: Options, own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    evaluate(options, own_run, tmp_path / "a", "--tune")
    path = kept_file(own_run)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert commands.evaluate(options(tmp_path / "b", "--checkpoint", str(own_run))) == 4
    error = capsys.readouterr().err
    assert message in error
    assert "--adaptation.fitted false" in error
    assert error.count("\n") == 1


def test_a_validation_text_that_is_too_short_is_named(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(tmp_path)
    corpus = tmp_path / "corpus"
    shutil.copytree(arguments[arguments.index("--data.path") + 1], corpus)
    valid = (corpus / "valid.txt").read_text().split("\n")
    (corpus / "valid.txt").write_text("\n".join(valid[:12]) + "\n")
    few = ["--data.path", str(corpus), "--training.epochs", "1"]
    assert commands.train(options(tmp_path, *few)) == 0
    assert commands.evaluate(options(tmp_path, *few, "--checkpoint", str(tmp_path), "--tune")) == 3
    assert "at least 100 are needed" in capsys.readouterr().err
