"""Run folders that evaluate.py wrote, read back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbpa_lm.config import EXPERTS, MEMORY_EXPERTS
from mbpa_lm.errors import DAMAGES, DataError, reason
from mbpa_lm.reporting.report import METRICS_FILE
from mbpa_lm.system.durable import read_json

TEXTS = {"ptb": "Penn Treebank", "wikitext-2": "WikiText-2", "builtin": "Python's documentation"}


@dataclass(frozen=True)
class Run:
    """One evaluation."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def experts(self) -> dict[str, Any]:
        return dict(self.metrics["experts"])

    @property
    def text(self) -> str:
        corpus = self.metrics["config"]["data"]["corpus"]
        return f"{TEXTS.get(corpus, corpus)}, {self.split}"

    @property
    def split(self) -> str:
        return str(self.metrics["stream"]["name"].split()[-1])

    @property
    def model(self) -> str:
        model = self.metrics["config"]["model"]
        if model.get("pretrained"):
            return f"{Path(model['pretrained']).name} ({self.metrics['parameters'] / 1e6:.1f} M)"
        if self.is_lstm:
            return f"{model['layers']} x {model['hidden_size']} LSTM"
        return f"{model['architecture']} ({self.metrics['parameters'] / 1e6:.1f} M)"

    @property
    def is_lstm(self) -> bool:
        model = self.metrics["config"]["model"]
        return model["kind"] == "lstm" and not model.get("pretrained")

    @property
    def settings(self) -> str:
        how = "tuned on the validation text" if self.metrics["tuned_on"] else "as configured"
        experts = [name for name in EXPERTS if name in self.metrics["config"]["evaluation"]["experts"]]
        if experts == list(MEMORY_EXPERTS):
            return how
        if set(experts) >= set(MEMORY_EXPERTS):
            return f"{how}, with {' and '.join(experts[len(MEMORY_EXPERTS) :])}"
        return f"{how}, only {' and '.join(name for name in experts if name != 'base')}"

    @property
    def seed(self) -> int:
        return int(self.metrics["checkpoint"]["trained"].get("seed", self.metrics["config"]["run"]["seed"]))

    def order(self) -> tuple[int, bool, str, bool, str]:
        """Return what runs are sorted by: text, model, tuned or not, split, name."""
        corpus = self.metrics["config"]["data"]["corpus"]
        place = list(TEXTS).index(corpus) if corpus in TEXTS else len(TEXTS)
        return place, not self.is_lstm, self.settings, self.split != "test", self.folder.name

    def is_like(self) -> str:
        """Return what runs have in common that differ by their seed only."""
        training = self.metrics["checkpoint"]["trained"].get("training")
        config = self.metrics["config"]
        return json.dumps([self.text, config["model"], training, self.settings, list(self.experts)], sort_keys=True)


def changed(path: Path, error: Exception) -> str:
    """Return what is said of a run that lacks something."""
    return f"{path} is not what evaluate.py writes now ({reason(error)}); run it again, or remove it"


def load_runs(folder: Path) -> list[Run]:
    """Read every run in a folder, in the order of the page. Raises DataError where there is none, or one cannot be read."""
    runs = []
    for path in sorted(folder.glob(f"*/{METRICS_FILE}")):
        try:
            run = Run(path.parent, read_json(path))
            run.order()
            run.is_like()
        except DAMAGES as error:
            raise DataError(changed(path, error)) from None
        if "gate" not in run.metrics:
            raise DataError(f"{path} is of the base model alone, and the page is about mixtures; run it with more --experts")
        runs.append(run)
    if not runs:
        raise DataError(
            f"{folder} holds no run with a {METRICS_FILE}; give the folder in which the run folders of evaluate.py lie"
        )
    return sorted(runs, key=Run.order)
