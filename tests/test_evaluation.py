"""evaluate.py from a checkpoint to metrics.json, on a small text."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mbpa_lm import commands
from mbpa_lm.config import AdaptationConfig
from mbpa_lm.system.durable import file_hash
from mbpa_lm.system.progress import console

Options = Callable[..., list[str]]


NAMES = ["base", "mbpa", "persistent", "mbpa+persistent", "cache-100", "cache-500", "cache-5000"]
"""Of the experts that are run where nothing else is said."""


def evaluate(options: Options, trained_run: Path, run: Path, *more: str) -> dict:
    assert commands.evaluate(options(run, "--checkpoint", str(trained_run), *more)) == 0
    return json.loads((run / "metrics.json").read_text())


def test_metrics_say_all_of_it(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "width", 160)
    metrics = evaluate(options, trained_run, tmp_path)
    assert list(metrics["experts"]) == [*NAMES, "gate", "equal weights"]
    for values in metrics["experts"].values():
        assert values["tokens"] == metrics["stream"]["scored"] == metrics["stream"]["tokens"] - 1
        assert values["perplexity"] == pytest.approx(math.exp(values["nats_per_token"]))
        assert values["bits_per_token"] == pytest.approx(math.log2(values["perplexity"]))
        assert values["bits_per_word"] == pytest.approx(values["bits_per_token"])  # word level: a token is a word
        assert 0 < values["bits_per_character"] < values["bits_per_token"]
        assert values["seconds"] > 0
        assert values["tokens_per_second"] > 0
    assert metrics["stream"]["documents"] == 1
    assert metrics["peak_memory_bytes"] > 10_000_000
    assert {"command", "commit", "date", "machine", "config", "checkpoint"} <= set(metrics)
    for name in ("mbpa", "mbpa+persistent"):  # the restricted solver tells how far off it may be
        values = metrics["experts"][name]
        assert 0 < values["error_bound_mean_nats"] < values["error_bound_worst_nats"] <= AdaptationConfig().tolerance
        assert 0 <= values["widened_share"] < 1
    losses = load_file(tmp_path / "losses.safetensors")
    for name, values in metrics["experts"].items():
        assert float(np.mean(losses[name], dtype=np.float64)) == pytest.approx(values["nats_per_token"])
    shown = capsys.readouterr().out
    for text in (
        "perplexity",
        "bits/char",
        "base",
        "mbpa",
        "unseen",
        "seen before in the stream",
        "peak memory",
        "metrics.json",
        "without it",
        "all caches",
        "chosen in hindsight",
    ):
        assert text in shown


def test_the_gate_is_told_of_in_full(options: Options, trained_run: Path, tmp_path: Path) -> None:
    metrics = evaluate(options, trained_run, tmp_path)
    experts, gate = metrics["experts"], metrics["gate"]
    assert list(gate["weights"]) == [*NAMES, "uniform"]
    assert sum(gate["weights"].values()) == pytest.approx(1)
    along = np.array(list(gate["weights_along_stream"].values()))
    np.testing.assert_allclose(along.sum(axis=0), 1)
    assert list(gate["without"]) == [*NAMES[1:], "all caches"]
    assert gate["best_fixed_weights_in_hindsight"]["perplexity"] < experts["equal weights"]["perplexity"]
    assert experts["gate"]["perplexity"] < experts["base"]["perplexity"]
    assert experts["gate"]["seconds"] > max(experts[name]["seconds"] for name in NAMES)


def test_weights_of_one_s_own(options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--experts", "base,cache", "--mixture.weights", "{base: 0.75, cache-100: 0.25}")
    experts = evaluate(options, trained_run, tmp_path / "a", *few)["experts"]
    assert "equal weights" not in experts
    quarter = ("--experts", "base,cache", "--cache.windows", "[100]", "--cache.weights", "[0.25]")
    alone = evaluate(options, trained_run, tmp_path / "b", *quarter)["experts"]["cache-100"]
    assert experts["fixed weights"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    for wrong, message in (("{base: 0.5, cache-7: 0.5}", "did you mean cache-"), ("{base: 0.5}", "sum to 1")):
        assert commands.evaluate(options(tmp_path, "--checkpoint", str(trained_run), "--mixture.weights", wrong)) == 2
        assert message in capsys.readouterr().err


def test_every_expert_can_be_asked_for(options: Options, trained_run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(trained_run, checkpoint)
    few = ("--experts", "knn,dynamic", "--knn.neighbours", "8", "--evaluation.max_tokens", "300")
    experts = evaluate(options, checkpoint, tmp_path / "run", *few)["experts"]
    assert list(experts) == ["base", "knn", "dynamic", "gate", "equal weights"]
    assert experts["dynamic"]["perplexity"] != experts["base"]["perplexity"]
    again = evaluate(options, checkpoint, tmp_path / "again", *few)["experts"]  # what was measured on the training text is kept
    assert {name: values["perplexity"] for name, values in again.items()} == {
        name: values["perplexity"] for name, values in experts.items()
    }


def test_tables_fit_a_terminal_of_80_columns(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "width", 80)
    evaluate(options, trained_run, tmp_path)
    assert "…" not in capsys.readouterr().out


def test_a_run_gives_the_same_losses_again_and_in_any_chunks(options: Options, trained_run: Path, tmp_path: Path) -> None:
    losses = []
    for name, chunk in (("a", "100"), ("b", "100"), ("c", "7")):
        evaluate(options, trained_run, tmp_path / name, "--evaluation.chunk_length", chunk)
        losses.append(load_file(tmp_path / name / "losses.safetensors"))
    for expert in NAMES:
        assert (losses[0][expert] == losses[1][expert]).all()
        np.testing.assert_allclose(losses[0][expert], losses[2][expert], atol=1e-4)


def test_documents_are_counted_where_a_pattern_marks_them(options: Options, trained_run: Path, tmp_path: Path) -> None:
    text = Path(options(tmp_path)[options(tmp_path).index("--data.path") + 1]) / "test.txt"
    arguments = ["--evaluation.text", str(text), "--data.document_pattern", " = [^=]+ = "]
    metrics = evaluate(options, trained_run, tmp_path, *arguments)
    assert metrics["stream"]["documents"] == 8
    assert metrics["experts"]["base"]["by_document_position"]["1-10"]["tokens"] == 8 * 10 - 1


def test_a_memory_helps_on_text_that_repeats_itself(options: Options, trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("name1 word2 word3 name4 word5 word6 name7\n" * 60)
    arguments = ["--evaluation.text", str(tmp_path / "text"), "--adaptation.steps", "5", "--adaptation.alpha", "0.5"]
    metrics = evaluate(options, trained_run, tmp_path, *arguments)
    assert metrics["experts"]["mbpa"]["perplexity"] < 0.5 * metrics["experts"]["base"]["perplexity"]


def test_a_vocabulary_smaller_than_the_likely_words(options: Options, tmp_path: Path) -> None:
    few = ["--tokenizer.vocabulary_size", "20", "--training.epochs", "1"]
    assert commands.train(options(tmp_path, *few)) == 0
    assert evaluate(options, tmp_path, tmp_path, *few)["experts"]["mbpa"]["tokens"] == 551


def test_an_expert_that_diverged_is_named_when_all_is_written(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(tmp_path, "--checkpoint", str(trained_run), "--experts", "base,mbpa,persistent")
    large = ("--adaptation.alpha", "1e9", "--persistent.rate", "1e9")
    assert commands.evaluate([*arguments, *large]) == 5
    output = capsys.readouterr()
    guess = f"worse than a guess among {len(words_of(trained_run)):,} words"
    assert output.err == f"error: mbpa, persistent diverged: {guess}; make adaptation.alpha or persistent.rate smaller\n"
    assert "times" in output.out
    found = json.loads((tmp_path / "metrics.json").read_text())["experts"]
    assert found["gate"]["perplexity"] < 2 * found["base"]["perplexity"] < found["mbpa"]["perplexity"]
    assert commands.evaluate([*arguments, *large, "--evaluation.on_error", "base"]) == 0
    assert "diverged: " in capsys.readouterr().out
    assert commands.evaluate(arguments) == 0
    assert "diverged: " not in capsys.readouterr().out


def words_of(run: Path) -> list[str]:
    (words, *_) = run.glob("checkpoints/*/tokenizer/vocabulary.json")
    return list(json.loads(words.read_text()))


def test_a_text_that_the_vocabulary_does_not_know_is_pointed_out(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, said in (("one two three four", True), ("word1 word2 word3 word1", False)):
        (tmp_path / "new.txt").write_text(text)
        more = ("--checkpoint", str(trained_run), "--experts", "base", "--evaluation.text", str(tmp_path / "new.txt"))
        assert commands.evaluate(options(tmp_path / "run", *more)) == 0
        stream = json.loads((tmp_path / "run" / "metrics.json").read_text())["stream"]
        assert stream["unknown_share"] == (0.8 if said else 0.0)  # of the words and the line's end
        assert ("80.0% of new.txt test are words that the vocabulary does not know" in capsys.readouterr().out) == said


def test_only_so_many_tokens_are_scored(options: Options, trained_run: Path, tmp_path: Path) -> None:
    assert evaluate(options, trained_run, tmp_path, "--evaluation.max_tokens", "50")["stream"]["scored"] == 50


@pytest.mark.parametrize("where", ["writing", "the last renaming"])
def test_results_that_cannot_be_written_leave_the_earlier_ones(
    options: Options,
    trained_run: Path,
    tmp_path: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics, replace = evaluate(options, trained_run, tmp_path), os.replace
    assert file_hash(tmp_path / "losses.safetensors") == metrics["losses_sha256"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "log.jsonl"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "writing":
        monkeypatch.setattr("mbpa_lm.reporting.report.write_json", full)
    else:
        monkeypatch.setattr(os, "replace", lambda one, two: full() if two.name == "metrics.json" else replace(one, two))
    arguments = options(tmp_path, "--checkpoint", str(trained_run), "--evaluation.max_tokens", "50")
    assert commands.evaluate(arguments) == 6
    assert "results could not be written" in capsys.readouterr().err
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "log.jsonl"}
    assert after == before


def test_weights_and_biases_gets_the_numbers_offline(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(options, trained_run, tmp_path, "--tracking.mode", "offline")
    assert "not available" not in capsys.readouterr().out
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_tracker_that_fails_stops_nothing(
    options: Options, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise ConnectionError("the tracker is away")

    monkeypatch.setattr("wandb.init", lambda **_: Broken())
    evaluate(options, trained_run, tmp_path, "--tracking.mode", "offline")
    assert capsys.readouterr().out.count("Weights & Biases is not available (the tracker is away)") == 1
