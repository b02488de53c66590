"""evaluate.py --tune, what it keeps with the checkpoint, and how evaluation uses it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mbpa_lm import commands
from mbpa_lm.checkpoints.tuned import FILE
from mbpa_lm.errors import AdaptationError
from mbpa_lm.tuning.rates import FACTOR, _tune, climb

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
    assert configured["tuned_on"] is None
    tuned = evaluate(options, own_run, tmp_path / "b", "--tune")
    shown = capsys.readouterr().out
    for text in ("the part tuned on", "best grid point", "configured", "as tuned on"):
        assert text in shown
    losses = tuned["tuned_on"]["losses"]["mbpa"]
    assert losses["tuned"] <= losses["best grid point"]
    assert losses["tuned"] < losses["base"]
    assert tuned["config"]["adaptation"]["weighting"] == "within_reach"
    again = evaluate(options, own_run, tmp_path / "c")
    assert again["experts"]["mbpa"]["perplexity"] == tuned["experts"]["mbpa"]["perplexity"]
    assert again["experts"]["mbpa"]["perplexity"] != configured["experts"]["mbpa"]["perplexity"]
    aside = evaluate(options, own_run, tmp_path / "d", "--evaluation.tuned", "false")
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


def test_every_expert_is_tuned_and_weighed(options: Options, own_run: Path, tmp_path: Path) -> None:
    few = ("--experts", "base,persistent,cache,knn,dynamic", "--knn.neighbours", "8", "--cache.windows", "[50,0]")
    few = (*few, "--cache.thetas", "[0.1,0.1]", "--cache.weights", "[0.2,0.2]")
    configured = evaluate(options, own_run, tmp_path / "a", *few, "--evaluation.split", "valid")
    tuned = evaluate(options, own_run, tmp_path / "b", *few, "--evaluation.split", "valid", "--tune")
    names = ["persistent", "cache-50", "cache-all", "knn", "dynamic"]
    assert set(tuned["tuned_on"]["losses"]) == {*names, "mixture"}
    for name in names:  # the text it was tuned on is the text it is measured on
        losses = tuned["tuned_on"]["losses"][name]
        assert losses["tuned"] <= losses["configured"] + 1e-9
        assert losses["tuned"] == pytest.approx(tuned["experts"][name]["nats_per_token"], abs=1e-3)
        assert losses["configured"] == pytest.approx(configured["experts"][name]["nats_per_token"], abs=1e-3)
    assert "tuned weights" not in configured["experts"]
    weighed = tuned["experts"]["tuned weights"]["nats_per_token"]
    assert weighed == pytest.approx(tuned["gate"]["best_fixed_weights_in_hindsight"]["nats_per_token"], abs=1e-3)
    # What is tuned later leaves what was tuned before; weights belong to the experts that were run.
    later = evaluate(options, own_run, tmp_path / "c", "--tune")
    assert set(later["tuned_on"]["losses"]) == {*names, "mbpa", "mixture"}
    kept = json.loads(kept_file(own_run).read_text())
    assert kept["settings"]["cache"]["windows"] == [50, 0]
    assert set(kept["weights"]) == {"base", "mbpa", "uniform"}


def test_climbing_finds_the_valley_from_either_side() -> None:
    for start in (1.0, 64.0):
        best, least = climb(lambda value: abs(math.log(value / 8)), start)
        assert (best, least) == (8.0, 0.0)
    assert climb(lambda value: -value, 1.0)[0] == FACTOR**4  # no farther, whatever it promises


def test_rates_that_diverge_are_not_chosen() -> None:
    def loss(rate: float, decay: float) -> float:
        if rate > 1:
            raise AdaptationError("diverged")
        return 2 - rate + decay

    found = _tune(loss, rate=1.0, decay=1.0)
    assert (found.rate, found.decay) == (1.0, FACTOR**-4)
    assert found.losses == {"configured": 2.0, "tuned": 1 + FACTOR**-4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "its format is not 1"),
        ({"metric": [1.0]}, "its metric is not 16 positive numbers"),
        ({"settings": {"adaptation": {"alpha": -1.0}}}, "adaptation.alpha is -1.0"),
        ({"settings": {"adaptation": {"alfa": 1.0}}}, "alfa"),
        ({"settings": {"magic": {}}}, "magic"),
        ({"weights": {"base": -0.5}}, "negative"),
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
    assert "--evaluation.tuned false" in error
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
