"""Numbers that are no probabilities are stopped, or replaced and counted; every expert's are right for whatever it is given."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbpa_lm import commands
from mbpa_lm.adaptation.slow_weights import GradientScale, SlowRule, SlowWeights
from mbpa_lm.config import AdaptationConfig
from mbpa_lm.errors import AdaptationError, NumericalError
from mbpa_lm.experts.base import Chunk
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.cache import CacheExpert
from mbpa_lm.experts.knn import KnnExpert
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.experts.persistent import PersistentExpert
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.base import ModelOutput, OutputLayer
from mbpa_lm.scoring.guard import Guard
from mbpa_lm.scoring.resources import make_history
from mbpa_lm.scoring.stream import score_stream
from tests.conftest import ListedStore

Options = Callable[..., list[str]]


class Model:
    """Hidden states of a table, one row a token: nothing but what a test puts there."""

    carries_state_in_training = False

    def __init__(self, table_Vd: Tensor, layer: OutputLayer) -> None:
        self.table_Vd, self._layer = table_Vd, layer
        self.vocabulary_size, self.hidden_size = layer.weight.shape

    def __call__(self, tokens: Tensor, state: object = None) -> ModelOutput:
        return ModelOutput(self.table_Vd[tokens], None, torch.zeros(()))

    def output_layer(self) -> OutputLayer:
        return self._layer


class Wrong(BaseModelExpert):
    """Gives what it is told to at one position."""

    name = "wrong"

    def __init__(self, value: float, position: int) -> None:
        self._value, self._left = value, position

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        found = super().target_log_probabilities(chunk, targets).clone()
        if 0 <= self._left < len(found):
            found[self._left] = self._value
        self._left -= len(found)
        return found


def small_model(vocabulary: int = 7, d: int = 4, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Model:
    generator = torch.Generator().manual_seed(0)
    weight, table = (torch.randn(vocabulary, d, generator=generator).mul_(scale).to(dtype) for _ in range(2))
    return Model(table, OutputLayer(weight, torch.zeros(vocabulary, dtype=dtype)))


def window(model: Model, size: int = 50) -> WindowMemory:
    return WindowMemory(
        size, model.hidden_size, min(5, model.vocabulary_size), model.output_layer().weight.dtype, torch.device("cpu")
    )


STREAM = np.random.default_rng(0).integers(7, size=60)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.01])
@pytest.mark.parametrize("position", [0, 31, 58])
def test_a_violation_stops_and_is_named(value: float, position: int) -> None:
    model = small_model()
    told = rf"expert wrong gave a log-probability of {value:g} at position {position}: token {STREAM[position + 1]} after"
    with pytest.raises(NumericalError, match=rf"{told} token {STREAM[position]}, a hidden state of length .*on_error base"):
        score_stream(model, STREAM, [BaseModelExpert(), Wrong(value, position)], window(model), 25)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.01])
def test_where_it_is_asked_for_the_base_model_takes_its_place(value: float) -> None:
    model, guard = small_model(), Guard(falls_back=True)
    scores = score_stream(model, STREAM, [BaseModelExpert(), Wrong(value, 31)], window(model), 25, guard=guard)
    np.testing.assert_array_equal(scores.losses["wrong"], scores.losses["base"])
    assert guard.fallen_back == {"wrong": 1}


class Diverging(BaseModelExpert):
    """Fails wherever one position is among those that it is given."""

    name = "diverging"

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        if bool((chunk.inputs == int(STREAM[31])).any()):
            raise AdaptationError("it diverged")
        return super().target_log_probabilities(chunk, targets) - 1


@pytest.mark.parametrize("chunk_length", [1, 25, 100])
def test_no_position_falls_back_for_what_happens_at_another(chunk_length: int) -> None:
    """Least of all at a later one, which is its future."""
    model, guard = small_model(), Guard(falls_back=True)
    scores = score_stream(model, STREAM, [BaseModelExpert(), Diverging()], window(model), chunk_length, guard=guard)
    fell_back = STREAM[:-1] == STREAM[31]
    expected = scores.losses["base"] + np.where(fell_back, 0, 1).astype(np.float32)
    np.testing.assert_allclose(scores.losses["diverging"], expected, rtol=1e-6)
    assert guard.fallen_back == {"diverging": int(fell_back.sum())}


def test_the_base_model_itself_always_stops() -> None:
    model = small_model()
    model.table_Vd[3] = math.nan
    with pytest.raises(NumericalError, match="expert base gave a log-probability of nan at position"):
        score_stream(model, STREAM, [BaseModelExpert()], window(model), 25, guard=Guard(falls_back=True))


def test_a_distribution_that_does_not_sum_to_one_is_found() -> None:
    class Short(BaseModelExpert):
        def log_probabilities(self, chunk: Chunk) -> Tensor:
            return super().log_probabilities(chunk) - 1e-4

    model = small_model()
    with pytest.raises(NumericalError, match=r"the distribution of expert base at position 12 sums to 0.999\d+, not to one"):
        score_stream(model, STREAM, [Short()], window(model), 25, guard=Guard(inspected=[12]))


def test_an_adaptation_that_diverges_is_counted_where_it_is_asked_for(
    options: Options, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(trained_run), "--experts", "base,mbpa", "--adaptation.alpha", "1e38"]
    arguments += ["--adaptation.steps", "3", "--adaptation.tolerance", "1e300", "--evaluation.max_tokens", "60"]
    assert commands.evaluate(options(tmp_path, *arguments)) in (5, 9)
    assert capsys.readouterr().err.startswith("error: ")
    assert commands.evaluate(options(tmp_path, *arguments, "--evaluation.on_error", "base")) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < metrics["experts"]["mbpa"]["fell_back_share"] <= 1
    assert "mbpa gave no probability at" in capsys.readouterr().out


def store_of(layer: OutputLayer) -> ListedStore:
    """A training text of four entries."""
    vocabulary, d = layer.weight.shape
    return ListedStore(torch.randn(4, d, generator=torch.Generator().manual_seed(1)), torch.arange(4) % vocabulary)


def slow_weights(layer: OutputLayer) -> SlowWeights:
    scale = GradientScale(torch.ones(layer.weight.shape), torch.ones(len(layer.weight)))
    return SlowWeights(layer.weight, layer.bias, SlowRule(5, 1e-3, 1e-3, 1.0), scale)


EXPERTS: dict[str, Callable[[OutputLayer], object]] = {
    "base": lambda layer: BaseModelExpert(),
    "mbpa": lambda layer: MbpaExpert(layer, AdaptationConfig(steps=3, alpha=0.02), 4),
    "mbpa, dual": lambda layer: MbpaExpert(layer, AdaptationConfig(steps=3, alpha=0.02, solver="dual"), 4),
    "mbpa, gaussian": lambda layer: MbpaExpert(layer, AdaptationConfig(steps=2, alpha=0.02, kernel="gaussian"), 4),
    "persistent": lambda layer: PersistentExpert(),
    "mbpa+persistent": lambda layer: MbpaExpert(layer, AdaptationConfig(steps=3, alpha=0.02), 4, from_slow_weights=True),
    "cache": lambda layer: CacheExpert(10, 0.1, 0.2),
    "knn": lambda layer: KnnExpert(store_of(layer), 3, 1.0, 0.3, grows=False),
    "knn that grows": lambda layer: KnnExpert(store_of(layer), 3, 1.0, 0.3, grows=True),
}


@pytest.mark.parametrize("name", EXPERTS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_an_expert_is_given_its_predictions_are_probabilities(name: str, data: st.DataObject) -> None:
    """Shapes, precisions, a vocabulary of one, a memory of one, extreme logits, keys that coincide."""
    vocabulary = data.draw(st.sampled_from([1, 2, 9, 200]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    scale = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 8.0]))
    model = small_model(vocabulary, data.draw(st.sampled_from([1, 3, 16])), scale, dtype)
    if data.draw(st.booleans()):
        model.table_Vd[:] = model.table_Vd[0].clone()  # all distances are zero
    tokens = np.array(data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=2, max_size=30)))
    layer = model.output_layer()
    expert = EXPERTS[name](layer)
    experts = [BaseModelExpert()] if name == "base" else [BaseModelExpert(), expert]
    memory = window(model, data.draw(st.sampled_from([1, 5, 50])))
    history = make_history(experts, model)
    slow = slow_weights(layer) if "persistent" in name else None
    guard = Guard(inspected=range(len(tokens)))
    scores = score_stream(model, tokens, experts, memory, data.draw(st.sampled_from([1, 7, 64])), slow, history, guard=guard)
    for losses in scores.losses.values():
        assert np.isfinite(losses).all()
        assert (losses >= 0).all()
