"""What must hold of every expert on every model: no prediction sees its future, and chunks change nothing."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mbpa_lm.adaptation.likely_words import likely_words
from mbpa_lm.adaptation.slow_weights import GradientScale, SlowRule, SlowWeights
from mbpa_lm.config import AdaptationConfig
from mbpa_lm.errors import AdaptationError
from mbpa_lm.experts.base import Chunk, Expert, SlowSoftmax
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.cache import CacheExpert
from mbpa_lm.experts.dynamic import DynamicExpert
from mbpa_lm.experts.dynamic_model import DynamicModel, DynamicRule
from mbpa_lm.experts.knn import KnnExpert
from mbpa_lm.experts.mbpa import MbpaExpert, make_weighting
from mbpa_lm.experts.persistent import PersistentExpert
from mbpa_lm.memory.base import Entries, Memory
from mbpa_lm.memory.composite import CompositeMemory, JoinedStores
from mbpa_lm.memory.history import UNBOUNDED, StreamHistory
from mbpa_lm.memory.slots import SlotMemory
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.mixing.gate import GateRule
from mbpa_lm.models.base import LanguageModel, OutputLayer
from mbpa_lm.scoring.mixed_scores import mixed_scores
from mbpa_lm.scoring.stream import score_stream
from tests.conftest import ListedStore, small_model

MODELS = ["lstm", "transformer"]
LENGTH, WINDOW, NEIGHBOURS, LIKELY = 160, 50, 6, 8


def mbpa(from_slow_weights: bool = False, **settings: object) -> Callable[[LanguageModel], Expert]:
    config = AdaptationConfig(**{"moved_words": 5, **settings})
    return lambda model: MbpaExpert(model.output_layer(), config, NEIGHBOURS, from_slow_weights)


def knn(grows: bool, weight: float = 0.5) -> Callable[[LanguageModel], Expert]:
    def make(model: LanguageModel) -> Expert:
        generator = torch.Generator().manual_seed(5)
        keys = torch.randn(200, model.hidden_size, generator=generator, dtype=torch.float64)
        store = ListedStore(keys, torch.randint(0, 30, (200,), generator=generator))
        return KnnExpert(store, neighbours=20, temperature=3.0, weight=weight, grows=grows)

    return make


def dynamic(optimizer: Literal["rms", "sgd"]) -> Callable[[LanguageModel], Expert]:
    def make(model: LanguageModel) -> Expert:
        assert isinstance(model, torch.nn.Module)
        scale = {name: torch.rand_like(parameter) for name, parameter in model.named_parameters()}
        return DynamicExpert(DynamicModel(model, DynamicRule(INTERVAL, 0.01, 0.02, 1.0, optimizer), scale))

    return make


INTERVAL = 7
EXPERTS: dict[str, Callable[[LanguageModel], Expert]] = {
    "base": lambda model: BaseModelExpert(),
    "mbpa": mbpa(steps=1, alpha=0.2),
    "mbpa of ten steps": mbpa(steps=10, alpha=0.05, beta=0.1, kernel="gaussian"),
    "mbpa on all words": mbpa(solver="dual", steps=3, alpha=0.1),
    "mbpa by reference": mbpa(solver="reference", optimizer="rmsprop", steps=2, alpha=0.01, bias=False),
    "mbpa with momentum": mbpa(solver="dual", optimizer="momentum", momentum=0.8, steps=4, alpha=0.05),
    "mbpa within reach": mbpa(steps=3, alpha=0.1, weighting="within_reach", reach=2.0),
    "mbpa unnormalized": mbpa(steps=3, alpha=0.1, weighting="unnormalized", epsilon=1.0),
    "mbpa on informative neighbours": mbpa(steps=3, alpha=0.1, selection="informative", candidates=12),
    "mbpa widened": mbpa(steps=3, alpha=0.1, tolerance=1e-6),
    "mbpa mixed with base": mbpa(steps=3, alpha=0.3, weight=0.4),
    "persistent": lambda model: PersistentExpert(),
    "mbpa from slow weights": mbpa(True, steps=3, alpha=0.1),
    "mbpa on all words from slow weights": mbpa(True, solver="dual", steps=3, alpha=0.1),
    "mbpa from slow weights mixed with them": mbpa(True, steps=3, alpha=0.1, weight=0.4),
    "cache": lambda model: CacheExpert(20, 0.1, 0.3),
    "unbounded cache": lambda model: CacheExpert(0, 0.1, 0.3),
    "knn": knn(grows=False),
    "knn that grows": knn(grows=True),
    "dynamic": dynamic("rms"),
    "dynamic by sgd": dynamic("sgd"),
}
LEARNS = ("dynamic", "dynamic by sgd")
"""What they predict next depends on which targets they were asked for."""


def make_slow_weights(layer: OutputLayer) -> SlowWeights:
    scale = GradientScale(torch.ones_like(layer.weight), None if layer.bias is None else torch.ones_like(layer.bias))
    return SlowWeights(layer.weight, layer.bias, SlowRule(INTERVAL, rate=0.2, decay=0.01, smoothing=1.0), scale)


def random_stream(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 30, LENGTH).astype(np.uint16)


def composite(*shape: Any) -> Memory:
    generator = torch.Generator().manual_seed(5)
    store = ListedStore(torch.rand(40, shape[1], generator=generator).double() - 0.5, torch.arange(40) % 30, LIKELY)
    return CompositeMemory(WindowMemory(*shape), JoinedStores([store]))


MEMORIES: dict[str, Callable[..., Memory]] = {
    "window": WindowMemory,
    "window of the surprising": lambda *shape: WindowMemory(*shape, surprise=3.4),
    "reservoir": lambda *shape: SlotMemory(*shape, "reservoir"),
    "least retrieved": lambda *shape: SlotMemory(*shape, "least_retrieved"),
    "least retrieved of the surprising": lambda *shape: SlotMemory(*shape, "least_retrieved", surprise=3.4),
    "composite": composite,
}


def losses(kind: str, expert: str, tokens: np.ndarray, chunk_length: int, memory_kind: str = "window") -> np.ndarray:
    model = small_model(kind)
    memory = MEMORIES[memory_kind](WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    experts = [EXPERTS[expert](model)]
    slow_weights = make_slow_weights(model.output_layer()) if experts[0].needs_slow_weights else None
    scores = score_stream(model, tokens, experts, memory, chunk_length, slow_weights, make_history(experts, model))
    (values,) = scores.losses.values()
    return values


def make_history(experts: Sequence[Expert], model: LanguageModel) -> StreamHistory:
    return StreamHistory(max(expert.window for expert in experts), model.hidden_size, torch.float64, torch.device("cpu"))


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


@pytest.mark.parametrize("memory", [name for name in MEMORIES if name != "window"])
def test_every_memory_is_causal_and_of_any_chunk_length(memory: str) -> None:
    tokens = random_stream()
    before = losses("lstm", "mbpa", tokens, 25, memory)
    for position in (60, 110, LENGTH - 1):
        changed = tokens.copy()
        changed[position:] = (changed[position:] + 7) % 30
        after = losses("lstm", "mbpa", changed, 25, memory)
        assert (before[: position - 1] == after[: position - 1]).all()  # to the bit
        assert before[position - 1] != after[position - 1]
    for chunk_length in (1, 7, 100):
        np.testing.assert_allclose(losses("lstm", "mbpa", tokens, chunk_length, memory), before, atol=1e-6)
    assert np.abs(before - losses("lstm", "mbpa", tokens, 25)).max() > 0.001  # not what the plain window gives


@pytest.mark.parametrize("expert", [name for name in EXPERTS if name != "base"])
def test_the_memory_changes_predictions(expert: str) -> None:
    tokens = random_stream()
    first = INTERVAL if expert == "persistent" or expert in LEARNS else 1
    assert np.abs(losses("lstm", expert, tokens, 25) - losses("lstm", "base", tokens, 25))[first:].min() > 0


def test_from_slow_weights_the_restricted_solver_is_near_the_dual_and_all_words_make_it_exact() -> None:
    tokens = random_stream()
    layer_losses = [losses("lstm", f"mbpa{name} from slow weights", tokens, 25) for name in ("", " on all words")]
    np.testing.assert_allclose(*layer_losses, atol=1e-6)  # of 30 words, all are moved
    plain = losses("lstm", "mbpa on all words", tokens, 25)
    assert np.abs(layer_losses[1] - plain)[2 * INTERVAL :].min() > 0


def test_text_that_repeats_is_predicted_better_with_a_memory() -> None:
    tokens = np.tile(random_stream()[:40], 4)
    base, adapted = losses("lstm", "base", tokens, 25), losses("lstm", "mbpa", tokens, 25)
    assert adapted[60:].mean() < base[60:].mean() - 0.2


def make_chunk(
    model: torch.nn.Module, tokens: np.ndarray, neighbours: int = NEIGHBOURS, from_slow_weights: bool = False
) -> Chunk:
    with torch.no_grad():
        hidden_states = model(torch.from_numpy(tokens.astype(np.int64))[None]).hidden_states[0]
        logits = model.output_layer().logits(hidden_states)
    memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    targets = torch.from_numpy(np.roll(tokens, -1).astype(np.int64))
    log_partitions, log_probabilities = logits.logsumexp(-1), logits.log_softmax(-1)
    entries = Entries(hidden_states, targets, log_partitions, *likely_words(log_probabilities, LIKELY))
    slow_weights = make_slow_weights(model.output_layer())
    for begin in range(0, 5 * INTERVAL, INTERVAL):
        piece = slice(begin, begin + INTERVAL)
        slow_weights.learn(hidden_states[piece], slow_weights.log_probabilities(hidden_states[piece])[0], targets[piece])
    slow = SlowSoftmax(slow_weights.weight_Vd, slow_weights.bias_V, *slow_weights.log_probabilities(hidden_states))
    found = memory.read_and_write(entries, neighbours)
    inputs = torch.from_numpy(tokens.astype(np.int64))
    history = StreamHistory(UNBOUNDED, model.hidden_size, torch.float64, torch.device("cpu"))
    stretch = history.read_and_write(hidden_states, targets)
    slow = slow if from_slow_weights else None
    return Chunk(inputs, hidden_states, log_probabilities, log_partitions, found, slow, stretch)


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("kind", MODELS)
def test_distributions_sum_to_one(kind: str, expert: str) -> None:
    model = small_model(kind)
    made = EXPERTS[expert](model)
    chunk = make_chunk(model, random_stream(), max(1, made.neighbours), made.needs_slow_weights)
    length = INTERVAL if expert in LEARNS else LENGTH
    chunk = chunk if length == LENGTH else chunk.part(slice(0, length))
    log_probabilities = made.log_probabilities(chunk)
    assert log_probabilities.shape == (length, 30)
    rounding = 1e-6 if "knn" in expert else 1e-12  # its distances are in single precision
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(length, dtype=torch.float64), atol=rounding, rtol=0)
    assert (log_probabilities <= rounding).all()
    targets = torch.from_numpy(random_stream(1).astype(np.int64))[:length]
    of_targets = made.target_log_probabilities(chunk, targets)
    torch.testing.assert_close(of_targets, log_probabilities.gather(1, targets[:, None])[:, 0], atol=rounding, rtol=0)


@pytest.mark.parametrize("solver", ["restricted", "dual", "reference"])
@pytest.mark.parametrize("nothing", [{"steps": 0}, {"alpha": 0.0}])
def test_no_step_is_the_base_model_to_the_bit(solver: str, nothing: dict[str, float]) -> None:
    model = small_model("lstm")
    chunk = make_chunk(model, random_stream())
    expert = MbpaExpert(model.output_layer(), AdaptationConfig(solver=solver, **nothing), NEIGHBOURS)
    assert torch.equal(expert.log_probabilities(chunk), chunk.base_log_probabilities)


def test_the_first_prediction_has_no_memory_and_is_the_base_model_s() -> None:
    tokens = random_stream()
    for expert in EXPERTS:
        if expert == "knn" or expert == "knn that grows":
            continue  # the training text is a memory that is there from the start
        assert losses("lstm", expert, tokens, 10)[0] == pytest.approx(losses("lstm", "base", tokens, 10)[0], abs=1e-6)


def test_a_step_too_long_is_reported_by_name() -> None:
    model = small_model("lstm")
    expert = MbpaExpert(model.output_layer(), AdaptationConfig(steps=30, alpha=1e308), NEIGHBOURS)
    with pytest.raises(AdaptationError, match=r"diverged with adaptation\.alpha 1e\+308 and adaptation\.steps 30; make one"):
        expert.log_probabilities(make_chunk(model, random_stream()))


def test_the_rest_is_that_of_the_weights_that_the_steps_start_from() -> None:
    tokens = random_stream()
    adapted, slow, mixed = (
        losses("lstm", name, tokens, 25)
        for name in ("mbpa from slow weights", "persistent", "mbpa from slow weights mixed with them")
    )
    np.testing.assert_allclose(np.exp(-mixed), 0.4 * np.exp(-adapted) + 0.6 * np.exp(-slow), rtol=1e-5)


def test_a_gate_over_all_sees_no_future_and_no_chunks() -> None:
    def gated(tokens: np.ndarray, chunk_length: int) -> np.ndarray:
        model = small_model("lstm")
        experts = [EXPERTS[name](model) for name in ("base", "mbpa", "persistent", "mbpa from slow weights", "cache")]
        memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
        slow_weights = make_slow_weights(model.output_layer())
        scores = score_stream(model, tokens, experts, memory, chunk_length, slow_weights, make_history(experts, model))
        return mixed_scores(scores, experts, GateRule(), 30, seed=0).losses["gate"]

    tokens = random_stream()
    before = gated(tokens, 25)
    for chunk_length in (1, 7, LENGTH):
        np.testing.assert_allclose(gated(tokens, chunk_length), before, atol=2e-5)
    for position in (60, LENGTH - 1):
        changed = tokens.copy()
        changed[position:] = (changed[position:] + 7) % 30
        assert (gated(changed, 25)[: position - 1] == before[: position - 1]).all()


def test_progress_and_time_are_told() -> None:
    model, told = small_model("lstm"), []
    memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    experts = [make(model) for make in (EXPERTS["base"], EXPERTS["mbpa"])]
    scores = score_stream(model, random_stream(), experts, memory, 50, on_progress=lambda scored, scores: told.append(scored))
    assert told == [50, 100, 150, LENGTH - 1]
    assert 0 < scores.seconds["base"] < scores.seconds["mbpa"]


def test_an_expert_is_not_disturbed_by_another_that_wants_more_neighbours() -> None:
    model = small_model("lstm")
    few, more = EXPERTS["mbpa"](model), EXPERTS["mbpa on informative neighbours"](model)
    assert (few.neighbours, more.neighbours) == (NEIGHBOURS, 12)
    more.name = "more"
    memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    together = score_stream(model, random_stream(), [few, more], memory, 25).losses
    np.testing.assert_allclose(together["mbpa"], losses("lstm", "mbpa", random_stream(), 25), atol=1e-6)
    alone = losses("lstm", "mbpa on informative neighbours", random_stream(), 25)
    np.testing.assert_allclose(together["more"], alone, atol=1e-6)


def test_no_memory_is_kept_where_no_expert_asks_for_neighbours() -> None:
    model = small_model("lstm")
    memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
    scores = score_stream(model, random_stream(), [BaseModelExpert()], memory, 25)
    assert len(memory) == 0
    assert np.isfinite(scores.losses["base"]).all()


def test_informative_neighbours_are_chosen_among_all_candidates() -> None:
    model = small_model("lstm")
    layer, chunk = model.output_layer(), make_chunk(model, random_stream(), 12)
    settings = {"solver": "dual", "steps": 3, "alpha": 0.1}
    of_all = MbpaExpert(layer, AdaptationConfig(**settings), 12).log_probabilities(chunk)
    informative = {"selection": "informative", "candidates": 12}
    for count in (12, 6):
        chosen = MbpaExpert(layer, AdaptationConfig(**settings, **informative), count).log_probabilities(chunk)
        nearest = MbpaExpert(layer, AdaptationConfig(**settings), count).log_probabilities(chunk)
        if count == 12:
            torch.testing.assert_close(chosen, of_all, atol=1e-10, rtol=0)  # the same ones in another order
        torch.testing.assert_close(chosen[: count + 1], nearest[: count + 1], atol=1e-10, rtol=0)  # there is no choice yet
    assert (chosen - nearest).abs().max() > 1e-2


def test_the_restricted_solver_tells_its_error_and_the_others_make_none() -> None:
    model, tokens = small_model("lstm"), random_stream()
    details = {}
    for name in ("mbpa", "mbpa widened", "mbpa on all words", "mbpa by reference", "base"):
        expert = EXPERTS[name](model)
        memory = WindowMemory(WINDOW, model.hidden_size, LIKELY, torch.float64, torch.device("cpu"))
        score_stream(model, tokens, [expert], memory, 25)
        details[name] = expert.details()
    for name in ("mbpa on all words", "mbpa by reference", "base"):
        assert details[name] == {}
    unwidened, widened = details["mbpa"], details["mbpa widened"]
    assert widened["widened_share"] == pytest.approx((LENGTH - 2) / (LENGTH - 1))  # the first position has no neighbours
    assert widened["error_bound_worst_nats"] <= 1e-6
    assert 0 <= unwidened["widened_share"] < 1
    assert 0 < unwidened["error_bound_mean_nats"] < unwidened["error_bound_worst_nats"] <= AdaptationConfig().tolerance


@pytest.mark.parametrize("kernel", ["inverse_distance", "gaussian"])
def test_neighbours_are_weighed_as_configured(kernel: str) -> None:
    near, far, at_reach = {
        "inverse_distance": (1 / 0.5, 1 / 3.5, 1 / 4.5),
        "gaussian": (1.0, math.exp(-3 / 0.5), math.exp(-4 / 0.5)),
    }[kernel]
    expected = {
        "normalized": near + far,
        "within_reach": near + far + at_reach,
        "unnormalized": near,
    }
    for weighting, total in expected.items():
        config = AdaptationConfig(kernel=kernel, epsilon=0.5, bandwidth=0.5, weighting=weighting, reach=2.0)
        weights = make_weighting(config)(torch.tensor([[0.0, 3.0, math.inf]], dtype=torch.float64))
        torch.testing.assert_close(weights, torch.tensor([[near, far, 0.0]], dtype=torch.float64) / total)
