"""What must hold of every expert on every model: no prediction sees its future, and chunks change nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mbpa_lm.config import AdaptationConfig
from mbpa_lm.errors import AdaptationError
from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.base import OutputLayer
from mbpa_lm.scoring import score_stream
from tests.conftest import small_model

EXPERTS: dict[str, Callable[[OutputLayer], Expert]] = {
    "base": lambda layer: BaseModelExpert(),
    "mbpa": lambda layer: MbpaExpert(layer, AdaptationConfig(steps=1, alpha=0.2, moved_words=5)),
    "mbpa of ten steps": lambda layer: MbpaExpert(
        layer, AdaptationConfig(steps=10, alpha=0.05, beta=0.1, kernel="gaussian", moved_words=5)
    ),
    "mbpa on all words": lambda layer: MbpaExpert(layer, AdaptationConfig(solver="dual", steps=3, alpha=0.1)),
    "mbpa by reference": lambda layer: MbpaExpert(
        layer, AdaptationConfig(solver="reference", optimizer="rmsprop", steps=2, alpha=0.01, bias=False)
    ),
}
MODELS = ["lstm", "transformer"]
LENGTH, WINDOW, NEIGHBOURS, LIKELY = 160, 50, 6, 8


def random_stream(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 30, LENGTH).astype(np.uint16)


def losses(kind: str, expert: str, tokens: np.ndarray, chunk_length: int) -> np.ndarray:
    model = small_model(kind)
    memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    experts = [EXPERTS[expert](model.output_layer())]
    scores = score_stream(model, tokens, experts, memory, NEIGHBOURS, chunk_length)
    (values,) = scores.losses.values()
    return values


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("kind", MODELS)
def test_future_tokens_change_no_earlier_prediction(kind: str, expert: str) -> None:
    tokens = random_stream()
    before = losses(kind, expert, tokens, 25)
    for position in (60, 110, LENGTH - 1):
        changed = tokens.copy()
        changed[position:] = (changed[position:] + 7) % 30
        after = losses(kind, expert, changed, 25)
        assert (before[: position - 1] == after[: position - 1]).all()  # to the bit
        assert before[position - 1] != after[position - 1]


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("kind", MODELS)
def test_chunks_of_any_length_give_the_same_losses(kind: str, expert: str) -> None:
    tokens = random_stream()
    one_by_one = losses(kind, expert, tokens, 1)
    for chunk_length in (7, 100):
        np.testing.assert_allclose(losses(kind, expert, tokens, chunk_length), one_by_one, atol=1e-6)


@pytest.mark.parametrize("expert", [name for name in EXPERTS if name != "base"])
def test_the_memory_changes_predictions(expert: str) -> None:
    tokens = random_stream()
    assert np.abs(losses("lstm", expert, tokens, 25) - losses("lstm", "base", tokens, 25))[1:].min() > 0


def test_text_that_repeats_is_predicted_better_with_a_memory() -> None:
    tokens = np.tile(random_stream()[:40], 4)
    base, adapted = losses("lstm", "base", tokens, 25), losses("lstm", "mbpa", tokens, 25)
    assert adapted[60:].mean() < base[60:].mean() - 0.2


def make_chunk(model: torch.nn.Module, tokens: np.ndarray) -> Chunk:
    with torch.no_grad():
        hidden_states = model(torch.from_numpy(tokens.astype(np.int64))[None]).hidden_states[0]
        log_probabilities = model.output_layer().logits(hidden_states).log_softmax(-1)
    memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    targets = torch.from_numpy(np.roll(tokens, -1).astype(np.int64))
    likely = log_probabilities.topk(LIKELY)
    log_partitions = model.output_layer().logits(hidden_states).logsumexp(-1)
    entries = Entries(hidden_states, targets, log_partitions.detach(), likely.indices, likely.values)
    found = memory.read_and_write(entries, NEIGHBOURS)
    return Chunk(hidden_states, log_probabilities, found)


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("kind", MODELS)
def test_distributions_sum_to_one(kind: str, expert: str) -> None:
    model = small_model(kind)
    log_probabilities = EXPERTS[expert](model.output_layer()).log_probabilities(make_chunk(model, random_stream()))
    assert log_probabilities.shape == (LENGTH, 30)
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(LENGTH, dtype=torch.float64))
    assert (log_probabilities <= 0).all()
    targets = torch.from_numpy(random_stream(1).astype(np.int64))
    of_targets = EXPERTS[expert](model.output_layer()).target_log_probabilities(make_chunk(model, random_stream()), targets)
    torch.testing.assert_close(of_targets, log_probabilities.gather(1, targets[:, None])[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", ["restricted", "dual", "reference"])
@pytest.mark.parametrize("nothing", [{"steps": 0}, {"alpha": 0.0}])
def test_no_step_is_the_base_model_to_the_bit(solver: str, nothing: dict[str, float]) -> None:
    model = small_model("lstm")
    chunk = make_chunk(model, random_stream())
    expert = MbpaExpert(model.output_layer(), AdaptationConfig(solver=solver, **nothing))
    assert torch.equal(expert.log_probabilities(chunk), chunk.base_log_probabilities)


def test_the_first_prediction_has_no_memory_and_is_the_base_model_s() -> None:
    tokens = random_stream()
    for expert in EXPERTS:
        assert losses("lstm", expert, tokens, 10)[0] == pytest.approx(losses("lstm", "base", tokens, 10)[0], abs=1e-6)


def test_a_step_too_long_is_reported_by_name() -> None:
    model = small_model("lstm")
    expert = MbpaExpert(model.output_layer(), AdaptationConfig(steps=30, alpha=1e308))
    with pytest.raises(AdaptationError, match=r"diverged with adaptation\.alpha 1e\+308 and adaptation\.steps 30; make one"):
        expert.log_probabilities(make_chunk(model, random_stream()))


def test_progress_and_time_are_told() -> None:
    model, told = small_model("lstm"), []
    memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    experts = [make(model.output_layer()) for make in (EXPERTS["base"], EXPERTS["mbpa"])]
    scores = score_stream(model, random_stream(), experts, memory, 3, 50, lambda scored, scores: told.append(scored))
    assert told == [50, 100, 150, LENGTH - 1]
    assert 0 < scores.seconds["base"] < scores.seconds["mbpa"]
