"""What the tests share: a small text with rare and recurring words, and the real corpora where they are."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mbpa_lm import commands
from mbpa_lm.config import Config, ModelConfig
from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.models.base import LanguageModel
from mbpa_lm.models.build import build_model
from mbpa_lm.options import make_parser, parse

SHARED = Path(__file__).resolve().parents[2] / "shared"

SMALL_RUN = [
    *("--data.corpus", "text", "--tracking.mode", "disabled", "--training.precision", "float32"),
    *("--model.hidden_size", "16", "--model.layers", "1", "--training.epochs", "2", "--training.batch_size", "4"),
    *("--training.sequence_length", "10", "--training.learning_rate", "0.01", "--memory.size", "200"),
]
"""Options of a run that takes about a second."""

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real corpora."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the real corpora are not at {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_checkpoints() -> Path:
    """Folder of the trained weights."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip(f"the trained weights are not at {SHARED / 'checkpoints'}")
    return SHARED / "checkpoints"


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """Write train.txt, valid.txt and test.txt: lines of common words and of names that recur within a document."""
    generator = random.Random(seed)
    common = [f"word{index}" for index in range(40)]
    names = [f"name{index}" for index in range(60)]
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in (("train", 40), ("valid", 8), ("test", 8)):
        lines = []
        for number in range(documents):
            local = generator.sample(names, 3)
            lines.append(f" = Document {number} = ")
            for _ in range(8):
                subject, verb, rest = generator.choice(local), generator.choice(common[:8]), generator.choices(common, k=5)
                lines.append(" ".join([subject, verb, *rest]))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def options(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Options of a small run in the given folder, and whatever else is said."""
    tokens = tmp_path_factory.mktemp("tokens")

    def make(run: Path, *more: str) -> list[str]:
        return [*SMALL_RUN, "--data.path", str(corpus), "--data.token_folder", str(tokens), "--run.folder", str(run), *more]

    return make


@pytest.fixture(scope="session")
def trained_run(options: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a small trained LSTM. Tests read it and never write into it."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert commands.train(options(run)) == 0
    return run


def parsed(arguments: list[str]) -> Config:
    return parse(make_parser("train.py", ""), arguments)[0]


class ListedStore:
    """Entries in a list, every one of which is measured."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, likely_words: int = 0) -> None:
        self.likely_words = likely_words
        words = torch.arange(likely_words).int().expand(len(keys), -1)
        self.entries = Entries(keys, values, torch.full((len(keys),), 9.0), words, torch.full(words.shape, 0.01).to(keys))

    def __len__(self) -> int:
        return len(self.entries.values)

    def search(self, queries: torch.Tensor, count: int) -> Neighbours:
        squared = (self.entries.keys - queries[:, None]).square().sum(-1)
        rows = len(self) - 1 - squared.flip(1).argsort(dim=1, stable=True)[:, :count]
        found = Entries(*(tensor[rows] for tensor in self.entries.tensors()))
        return Neighbours(found, squared.gather(1, rows), rows)


def small_model(kind: str, vocabulary_size: int = 30, seed: int = 0) -> LanguageModel:
    """An untrained float64 model of either kind in evaluation mode, with a peaked softmax."""
    torch.manual_seed(seed)
    config = (
        ModelConfig(kind="lstm", hidden_size=16, layers=2)
        if kind == "lstm"
        else ModelConfig(kind="transformer", settings=GPT2, context_length=12, context_overlap=4)
    )
    model = build_model(config, vocabulary_size).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model
