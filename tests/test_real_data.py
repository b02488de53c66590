"""Penn Treebank, WikiText-2 and a trained LSTM, where they are: published counts and a known perplexity."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mbpa_lm.adaptation import dual, restricted
from mbpa_lm.adaptation.kernels import inverse_distance, normalized
from mbpa_lm.adaptation.likely_words import likely_words
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.config import AdaptationConfig, DataConfig, MemoryConfig, ModelConfig
from mbpa_lm.data.corpora import open_corpus
from mbpa_lm.data.streams import TokenStream, open_stream
from mbpa_lm.data.tokenizers import WordTokenizer
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.build import build_model
from mbpa_lm.models.lstm import LSTMLanguageModel
from mbpa_lm.numerics.perplexities import perplexity
from mbpa_lm.scoring.stream import score_stream

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
    return WindowMemory(size, model.hidden_size, MemoryConfig().likely_words, torch.float32, torch.device("cpu"))


def test_the_trained_lstm_has_its_known_perplexity(
    trained: tuple[LSTMLanguageModel, WordTokenizer], ptb_test: TokenStream
) -> None:
    scores = score_stream(trained[0], ptb_test.tokens, [BaseModelExpert()], make_memory(trained[0], 1), 1000)
    assert len(scores.losses["base"]) == 82_429
    assert perplexity(scores.losses["base"].mean(dtype=np.float64)) == pytest.approx(86.44, abs=0.005)


def test_the_memory_lowers_it_and_solvers_agree(
    trained: tuple[LSTMLanguageModel, WordTokenizer], ptb_test: TokenStream
) -> None:
    model, stream = trained[0], ptb_test.first(4001)
    layer = model.output_layer()
    experts = [BaseModelExpert(), MbpaExpert(layer, AdaptationConfig(alpha=0.05), 32)]
    scores = score_stream(model, stream.tokens, experts, make_memory(model, 5000), 100)
    base, adapted = (losses.mean(dtype=np.float64) for losses in scores.losses.values())
    assert adapted < base - 0.01
    short, ten_steps = stream.first(81), {"steps": 10, "alpha": 0.05}
    for optimizer, length in (("sgd", 81), ("momentum", 31)):
        by_solver = [
            score_stream(
                model,
                short.tokens[:length],
                [MbpaExpert(layer, AdaptationConfig(solver=solver, optimizer=optimizer, **ten_steps), 8)],
                make_memory(model, 50),
                100,
            ).losses["mbpa"]
            for solver in ("dual", "reference")
        ]
        np.testing.assert_allclose(*by_solver, atol=1e-4)


@pytest.fixture(scope="module", params=COUNTS)
def adapted_states(
    request: pytest.FixtureRequest,
    shared_data: Path,
    trained: tuple[LSTMLanguageModel, WordTokenizer],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Problem, torch.Tensor]:
    """The last 100 of 4,000 states of a test set with their 32 nearest among all before, and the words that followed.

    The model was trained on PTB: of WikiText-2 it reads the words that PTB has too.
    """
    model, layer = trained[0], trained[0].output_layer()
    corpus = open_corpus(DataConfig(corpus=request.param, path=str(shared_data / request.param)))
    stream = open_stream(corpus, "test", trained[1], tmp_path_factory.mktemp("tokens"))
    tokens = torch.from_numpy(stream.tokens[:4001].astype(np.int64))
    with torch.no_grad():
        states = model(tokens[None, :-1]).hidden_states[0]
        logits = layer.logits(states)
        log_partitions, log_probabilities = logits.logsumexp(-1), logits.log_softmax(-1)
        likely = likely_words(log_probabilities, MemoryConfig().likely_words)
    found = make_memory(model, 5000).read_and_write(Entries(states, tokens[1:], log_partitions, *likely), 32)
    last = slice(3900, 4000)
    found, config = found.of(last), AdaptationConfig()
    problem = Problem(
        layer.weight.detach(),
        None if layer.bias is None else layer.bias.detach(),
        found.entries.keys,
        found.entries.values,
        normalized(inverse_distance(config.epsilon))(found.squared_distances),
        states[last],
        BaseSoftmax(
            log_probabilities[last],
            found.entries.log_partitions,
            found.entries.likely_words,
            found.entries.likely_probabilities,
        ),
    )
    return problem, tokens[1:][last]


def test_few_moved_words_are_nearly_the_whole_vocabulary(adapted_states: tuple[Problem, torch.Tensor]) -> None:
    problem, targets = adapted_states
    config = AdaptationConfig()
    rule = AdaptationRule(10, 0.05)
    solution = restricted.solve_with_bounds(problem, rule, targets, config.moved_words, config.tolerance)
    differences = solution.log_probabilities - dual.solve(problem, rule, targets)
    errors = differences.abs()
    assert float(errors.mean()) < 1e-3
    assert float(errors.max()) < 2e-2
    assert abs(float(differences.mean().exp()) - 1) < 5e-4  # of the perplexity
    moved = (solution.log_probabilities - problem.base.log_probabilities_BV.gather(1, targets[:, None])[:, 0]).abs()
    assert float(moved.mean()) > 100 * float(errors.mean())


def test_no_word_of_the_vocabulary_is_farther_off_than_its_bound(adapted_states: tuple[Problem, torch.Tensor]) -> None:
    problem, rounding = adapted_states[0].rows(slice(0, 40)), 1e-4
    for rule in (AdaptationRule(10, 0.05), AdaptationRule(10, 0.02, optimizer="momentum"), AdaptationRule(30, 0.05)):
        exact = dual.solve(problem, rule)
        for tolerance in (0.1, 0.01):
            solution = restricted.solve_with_bounds(problem, rule, None, AdaptationConfig().moved_words, tolerance)
            errors = (solution.log_probabilities - exact).abs().amax(1)
            assert bool((errors <= solution.bounds_B + rounding).all())
            assert float(errors.max()) <= tolerance + rounding


def test_the_bound_holds_for_long_steps_too(adapted_states: tuple[Problem, torch.Tensor]) -> None:
    problem, rounding = adapted_states[0], 1e-3
    for alpha in (0.5, 1.0):
        rule = AdaptationRule(10, alpha)
        solution = restricted.solve_with_bounds(problem, rule, None, AdaptationConfig().moved_words, 0.1)
        errors = (solution.log_probabilities - dual.solve(problem, rule)).abs().amax(1)
        assert bool((errors <= solution.bounds_B + rounding).all())
