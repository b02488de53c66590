"""The page of results and the figures, from the metrics that a small run leaves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mbpa_lm import commands
from mbpa_lm.config import Config
from mbpa_lm.reporting.figures import FOLDER
from mbpa_lm.results.__main__ import main
from mbpa_lm.results.runs import TEXTS

Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def runs(options: Options, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluation, the same on another machine, and the same as if it were of another seed."""
    folder = tmp_path_factory.mktemp("results")
    assert commands.evaluate(options(folder / "one", "--checkpoint", str(trained_run))) == 0
    shutil.copytree(folder / "one", folder / "one_elsewhere")
    shutil.copytree(folder / "one", folder / "two")
    metrics = json.loads((folder / "two" / "metrics.json").read_text())
    metrics["checkpoint"]["trained"]["seed"] = 2
    metrics["experts"]["gate"]["perplexity"] *= 1.1
    (folder / "two" / "metrics.json").write_text(json.dumps(metrics))
    return folder


def write(folder: Path, output: Path) -> int:
    return main([str(folder), "--output", str(output)])


def test_every_number_of_a_run_is_on_the_page_with_where_it_came_from(runs: Path, tmp_path: Path) -> None:
    assert write(runs, tmp_path / "RESULTS.md") == 0
    page = (tmp_path / "RESULTS.md").read_text()
    metrics = json.loads((runs / "one" / "metrics.json").read_text())
    for name, values in metrics["experts"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} | {values['perplexity']:.2f} "))
        assert f"{values['tokens_per_second']:,.0f}" in row
    for text in (
        metrics["command"],
        metrics["checkpoint"]["trained"]["command"],
        metrics["commit"],
        metrics["machine"],
        "seed 1, 2 epochs",
        "AWD-LSTM with dynamic evaluation | 51.1 | 44.3",
        "seen before, at most 10 times in training",
        f"![gain]({runs.as_posix()}/one/figures/gain.png)",
    ):
        assert text in page
    base, gate = (metrics["experts"][name]["perplexity"] for name in ("base", "gate"))
    assert f"| 1, 2 | {base:.2f} ± 0.00 | {1.05 * gate:.2f} ± {0.1 * gate / 2**0.5:.2f} |" in page


def test_the_page_is_the_same_again(runs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert write(runs, tmp_path / name) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_runs_that_cannot_be_used_are_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path, tmp_path / "page") == 3
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.json").write_text("{}")
    assert write(tmp_path, tmp_path / "page") == 3
    assert "odd/metrics.json is not what evaluate.py writes" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_figures_are_drawn_for_one_expert_and_for_many(runs: Path, options: Options, trained_run: Path, tmp_path: Path) -> None:
    names = {"along_stream", "gain", "gate_weights", "quality_against_cost"}
    assert {path.stem for path in (runs / "one" / FOLDER).iterdir()} == names
    assert commands.evaluate(options(tmp_path, "--checkpoint", str(trained_run), "--experts", "base")) == 0
    drawn = list((tmp_path / FOLDER).iterdir())
    assert {path.stem for path in drawn} == names - {"gain", "gate_weights"}
    for path in [*drawn, *(runs / "one" / FOLDER).iterdir()]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5_000


def test_known_texts_are_corpora() -> None:
    assert set(TEXTS) < set(Config.__dataclass_fields__["data"].type.__annotations__["corpus"].__args__)


def test_a_run_of_the_base_model_alone_is_refused(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.evaluate(options(tmp_path / "one", "--checkpoint", str(trained_run), "--experts", "base")) == 0
    capsys.readouterr()
    assert write(tmp_path, tmp_path / "page") == 3
    assert "is of the base model alone" in capsys.readouterr().err
