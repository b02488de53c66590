"""Penn Treebank, WikiText-2 and a trained LSTM, where they are: published counts and a known perplexity."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mbpa_lm.config import AdaptationConfig, DataConfig, ModelConfig
from mbpa_lm.data.corpora import open_corpus
from mbpa_lm.data.streams import TokenStream, open_stream
from mbpa_lm.data.tokenizers import WordTokenizer
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.metrics import perplexity
from mbpa_lm.models.build import build_model
from mbpa_lm.models.lstm import LSTMLanguageModel
from mbpa_lm.scoring import score_stream

COUNTS = {
    "ptb": (10_000, {"train": 929_589, "valid": 73_760, "test": 82_430}),
    "wikitext-2": (33_278, {"train": 2_088_628, "valid": 217_646, "test": 245_569}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_corpora_have_the_published_counts(shared_data: Path, name: str, tmp_path: Path) -> None:
    vocabulary_size, counts = COUNTS[name]
    corpus = open_corpus(DataConfig(corpus=name, path=str(shared_data / name)))
    tokenizer = WordTokenizer.train(corpus.pieces("train"), 1, 0)
    assert tokenizer.vocabulary_size == vocabulary_size
    for split, count in counts.items():
        stream = open_stream(corpus, split, tokenizer, tmp_path)
        assert len(stream) == count
        text = (shared_data / name / f"{split}.txt").read_text(encoding="utf-8")
        assert int(stream.characters.sum(dtype=np.int64)) == len(text)
        assert int(stream.words.sum(dtype=np.int64)) == count
        if name == "wikitext-2":
            titles = [line for line in text.split("\n") if line.startswith(" = ") and not line.startswith(" = =")]
            assert len(stream.document_starts) == pytest.approx(len(titles), abs=2)
            assert {"train": 600, "valid": 60, "test": 60}[split] == pytest.approx(len(stream.document_starts), rel=0.1)


@pytest.fixture(scope="module")
def trained(shared_checkpoints: Path) -> tuple[LSTMLanguageModel, WordTokenizer]:
    folder = shared_checkpoints / "ptb-lstm-2x400"
    tensors = {
        name.replace("lstm.", "layers."): tensor.float() for name, tensor in load_file(folder / "weights.safetensors").items()
    }
    model = build_model(ModelConfig(hidden_size=400, layers=2), 10_000)
    assert isinstance(model, LSTMLanguageModel)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["output.weight"], [])  # tied to the embedding
    return model.eval(), WordTokenizer(json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def ptb_test(
    shared_data: Path, trained: tuple[LSTMLanguageModel, WordTokenizer], tmp_path_factory: pytest.TempPathFactory
) -> TokenStream:
    corpus = open_corpus(DataConfig(corpus="ptb", path=str(shared_data / "ptb")))
    return open_stream(corpus, "test", trained[1], tmp_path_factory.mktemp("tokens"))


def make_memory(model: LSTMLanguageModel, size: int) -> WindowMemory:
    return WindowMemory(size, model.hidden_size, 64, torch.float32, torch.device("cpu"))


def test_the_trained_lstm_has_its_known_perplexity(
    trained: tuple[LSTMLanguageModel, WordTokenizer], ptb_test: TokenStream
) -> None:
    scores = score_stream(trained[0], ptb_test.tokens, [BaseModelExpert()], make_memory(trained[0], 1), 1, 1000)
    assert len(scores.losses["base"]) == 82_429
    assert perplexity(scores.losses["base"].mean(dtype=np.float64)) == pytest.approx(86.44, abs=0.005)


def test_the_memory_lowers_it_and_solvers_agree(
    trained: tuple[LSTMLanguageModel, WordTokenizer], ptb_test: TokenStream
) -> None:
    model, stream = trained[0], ptb_test.first(4001)
    layer = model.output_layer()
    experts = [BaseModelExpert(), MbpaExpert(layer, AdaptationConfig())]
    scores = score_stream(model, stream.tokens, experts, make_memory(model, 5000), 32, 100)
    base, adapted = (losses.mean(dtype=np.float64) for losses in scores.losses.values())
    assert adapted < base - 0.01
    short, ten_steps = stream.first(81), {"steps": 10, "alpha": 0.05}
    by_solver = [
        score_stream(
            model,
            short.tokens,
            [MbpaExpert(layer, AdaptationConfig(solver=solver, **ten_steps))],
            make_memory(model, 50),
            8,
            100,
        ).losses["mbpa"]
        for solver in ("dual", "reference")
    ]
    np.testing.assert_allclose(*by_solver, atol=1e-4)
