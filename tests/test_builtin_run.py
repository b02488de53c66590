"""The demo in small, on real text: a quick LSTM on the built-in corpus, and a memory that wins."""

import json
from pathlib import Path

from mbpa_lm import commands

ROOT = Path(__file__).parents[1]


def test_the_memory_wins_on_the_built_in_corpus(tmp_path: Path) -> None:
    arguments = [
        *(
            "--config",
            str(ROOT / "configs" / "demo.yaml"),
            "--run.folder",
            str(tmp_path / "run"),
            "--tracking.mode",
            "disabled",
        ),
        *("--data.token_folder", str(tmp_path / "tokens"), "--model.hidden_size", "128", "--training.epochs", "1"),
        *("--evaluation.max_tokens", "5000"),
    ]
    assert commands.train(arguments) == 0
    assert commands.evaluate([*arguments, "--checkpoint", str(tmp_path / "run")]) == 0
    experts = json.loads((tmp_path / "run" / "metrics.json").read_text())["experts"]
    assert experts["mbpa"]["perplexity"] < 0.95 * experts["base"]["perplexity"]
    again = "seen before, at most 10 times in training"
    rare = {name: values["by_recurrence"][again]["perplexity"] for name, values in experts.items()}
    assert rare["mbpa"] < 0.95 * rare["base"]
