"""What a configuration leaves open: a model whose hidden states are longer, and that predicts the same, is adapted the same."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mbpa_lm import commands
from mbpa_lm.adaptation.slow_weights import GradientStatistics, SlowRule, SlowWeights
from mbpa_lm.checkpoints.scales import fill_in, mean_squared_norm, measure_norm
from mbpa_lm.config import AdaptationConfig, Config, EvaluationConfig, MemoryConfig
from mbpa_lm.config.checks import known
from mbpa_lm.errors import ConfigError
from mbpa_lm.experts.base import Expert
from mbpa_lm.experts.build import build_experts
from mbpa_lm.memory.base import EntryStore
from mbpa_lm.memory.history import UNBOUNDED, StreamHistory
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.base import LanguageModel, ModelOutput, OutputLayer, State
from mbpa_lm.options import make_parser, parse
from mbpa_lm.scoring.stream import score_stream
from tests.conftest import ListedStore, small_model

TOKENS = np.random.default_rng(0).integers(0, 30, 200).astype(np.uint16)
OPEN = ["mbpa", "persistent", "mbpa+persistent", "cache", "knn"]


class Stretched:
    """A model with hidden states of `factor` times the length, and an output layer that makes up for it."""

    carries_state_in_training = False

    def __init__(self, model: LanguageModel, factor: float) -> None:
        self._model, self._factor = model, factor
        self.vocabulary_size, self.hidden_size = model.vocabulary_size, model.hidden_size
        self._weight = model.output_layer().weight.detach() / factor

    def __call__(self, tokens: Tensor, state: State | None = None) -> ModelOutput:
        output = self._model(tokens, state)
        return output._replace(hidden_states=output.hidden_states * self._factor)

    def output_layer(self) -> OutputLayer:
        return OutputLayer(self._weight, None)


def losses(factor: float) -> dict[str, np.ndarray]:
    model = Stretched(small_model("lstm"), factor)
    layer = model.output_layer()
    with torch.no_grad():
        read = torch.from_numpy(TOKENS.astype(np.int64))
        hidden_states = model(read[None, :-1]).hidden_states[0]
    statistics = GradientStatistics(layer.weight, None)
    for begin in range(0, 180, 20):
        statistics.add(hidden_states[begin : begin + 20], read[begin + 1 : begin + 21])
    scale = statistics.scale()
    # A bias has a length of its own, and so has what the kernel adds to distances: both are left out.
    adaptation = AdaptationConfig(bias=False, epsilon=1e-12)
    config = Config(evaluation=EvaluationConfig(experts=["base", *OPEN]), adaptation=adaptation)
    config = fill_in(config, 30, lambda: measure_norm(model, TOKENS), lambda: float(scale.weight_Vd.mean()))

    def store() -> EntryStore:
        return ListedStore(hidden_states[:50], read[1:51])

    def no_model() -> None:
        raise AssertionError

    experts: Sequence[Expert] = build_experts(config, layer, store, no_model)  # type: ignore[arg-type]
    persistent, device = config.persistent, torch.device("cpu")
    rate = known("persistent.rate", persistent.rate)
    slow = SlowWeights(layer.weight, None, SlowRule(20, rate, persistent.decay, persistent.smoothing), scale)
    memory = WindowMemory(100, model.hidden_size, 8, torch.float64, device)
    history = StreamHistory(UNBOUNDED, model.hidden_size, torch.float64, device)
    return score_stream(model, TOKENS, experts, memory, 50, slow, history).losses


def test_what_is_left_open_follows_the_length_of_hidden_states() -> None:
    short, long = losses(1.0), losses(12.0)
    assert {"base", *OPEN} - {"cache"} <= short.keys()
    for name, values in short.items():
        np.testing.assert_allclose(long[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
        if name != "base":
            assert np.abs(values - short["base"]).max() > 0.01


def refuse() -> float:
    raise AssertionError("nothing is to be measured")


def test_what_is_given_stays_and_nothing_is_measured_for_it() -> None:
    config = Config(evaluation=EvaluationConfig(experts=["base"]))
    assert fill_in(config, 30, refuse, refuse).adaptation.alpha is None
    given = ["--adaptation.alpha", "0.3", "--cache.thetas", "[0.1,0.2,0.3]", "--persistent.rate", "0.01"]
    parsed = parse(make_parser("evaluate.py", ""), given)[0]
    filled = fill_in(parsed, 30, refuse, refuse)
    assert (filled.adaptation.alpha, filled.cache.thetas, filled.persistent.rate) == (0.3, [0.1, 0.2, 0.3], 0.01)
    assert filled.cache.weights == [0.1, 0.1, 0.1]


def test_the_norm_is_measured_once_a_checkpoint(tmp_path: Path) -> None:
    model, asked = small_model("lstm"), []

    def tokens() -> np.ndarray:
        asked.append(1)
        return TOKENS

    first = mean_squared_norm(tmp_path, model, tokens)
    assert mean_squared_norm(tmp_path, model, tokens) == first
    assert len(asked) == 1
    for content in ("", "[]", '{"tokens": 1}', json.dumps({"tokens": 2048, "mean_squared_norm": -1})):
        (tmp_path / "hidden_states.json").write_text(content)
        assert mean_squared_norm(tmp_path, model, tokens) == first
    altered = {**json.loads((tmp_path / "hidden_states.json").read_text()), "mean_squared_norm": 2 * first}
    (tmp_path / "hidden_states.json").write_text(json.dumps(altered))
    assert mean_squared_norm(tmp_path, model, tokens) == first


def test_no_more_neighbours_are_asked_for_than_a_window_holds() -> None:
    layer = small_model("lstm").output_layer()
    for datastores, expected in (([], 20), (["memories/one"], 500)):
        memory = MemoryConfig(size=20, neighbours=500, datastores=datastores)
        config = Config(memory=memory, adaptation=AdaptationConfig(alpha=0.1), evaluation=EvaluationConfig(experts=["mbpa"]))
        experts = build_experts(config, layer, lambda: None, lambda: None)  # type: ignore[arg-type, return-value]
        assert experts[-1].neighbours == expected


def test_what_is_still_open_when_it_is_needed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"knn.temperature is empty; give it a value"):
        known("knn.temperature", None)


def test_an_evaluation_records_what_was_filled_in(options: Callable[..., list[str]], trained_run: Path, tmp_path: Path) -> None:
    assert commands.evaluate(options(tmp_path / "run", "--checkpoint", str(trained_run))) == 0
    config = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    assert config["adaptation"]["alpha"] > 0
    assert config["persistent"]["rate"] > 0
    assert len(config["cache"]["thetas"]) == 3
