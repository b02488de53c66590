"""The published methods against small implementations of their formulas, written without this project's code."""

from typing import Literal

import numpy as np
import pytest
import torch

from mbpa_lm.experts.base import Chunk
from mbpa_lm.experts.cache import CacheExpert
from mbpa_lm.experts.dynamic_model import DynamicModel, DynamicRule
from mbpa_lm.experts.knn import KnnExpert
from mbpa_lm.memory.history import UNBOUNDED, StreamHistory
from tests.conftest import ListedStore, small_model

LENGTH, V, d = 120, 12, 8


def random_chunk(dtype: torch.dtype) -> tuple[Chunk, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(LENGTH, d, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (LENGTH,), generator=generator)
    base = torch.randn(LENGTH, V, generator=generator, dtype=dtype).log_softmax(-1)
    stretch = StreamHistory(UNBOUNDED, d, dtype, torch.device("cpu")).read_and_write(hidden_states, targets)
    return Chunk(targets.roll(1), hidden_states, base, torch.zeros(LENGTH, dtype=dtype), None, None, stretch), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [1, 10, 0])
def test_the_continuous_cache(window: int, dtype: torch.dtype) -> None:
    chunk, targets = random_chunk(dtype)
    found = CacheExpert(window, 0.4, 0.5).target_log_probabilities(chunk, targets).double().numpy()
    states, words = chunk.hidden_states.double().numpy(), targets.numpy()
    for t in range(1, LENGTH):
        first = max(0, t - window) if window else 0
        scores = [float(np.exp(0.4 * states[i] @ states[t])) for i in range(first, t)]
        of_target = sum(score for i, score in zip(range(first, t), scores, strict=True) if words[i] == words[t])
        if of_target == 0:
            assert found[t] == -np.inf
        else:
            assert found[t] == pytest.approx(np.log(of_target / sum(scores)), abs=1e-5)


@pytest.mark.parametrize("grows", [False, True])
def test_knn_lm(grows: bool) -> None:
    chunk, targets = random_chunk(torch.float32)
    generator = np.random.default_rng(1)
    keys, values = generator.normal(size=(300, d)).astype(np.float32), generator.integers(0, V, 300)
    expert = KnnExpert(ListedStore(torch.from_numpy(keys), torch.from_numpy(values)), 16, 2.5, 0.5, grows)
    found = expert.target_log_probabilities(chunk, targets).numpy()
    states, words = chunk.hidden_states.double().numpy(), targets.numpy()
    for t in range(LENGTH):
        known, followed = keys.astype(np.float64), values
        if grows:
            known, followed = np.concatenate([known, states[:t]]), np.concatenate([followed, words[:t]])
        distances = ((known - states[t]) ** 2).sum(1)
        nearest = np.argsort(distances)[:16]
        counts = np.exp(-distances[nearest] / 2.5)
        of_target = counts[followed[nearest] == words[t]].sum()
        if of_target == 0:
            assert found[t] == -np.inf
        else:
            assert found[t] == pytest.approx(np.log(of_target / counts.sum()), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["rms", "sgd"])
def test_dynamic_evaluation_s_parameters_after_ten_updates(optimizer: Literal["rms", "sgd"]) -> None:
    model, by_hand = small_model("lstm"), small_model("lstm")
    rate, decay, smoothing = 0.05, 0.2, 0.5
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 30, (51,), generator=generator)
    scale = {name: torch.rand(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}
    dynamic = DynamicModel(model, DynamicRule(5, rate, decay, smoothing, optimizer), scale)
    dynamic.score(tokens[:-1], tokens[1:])
    trained = {name: parameter.detach().clone() for name, parameter in by_hand.named_parameters()}
    mean = torch.cat([values.flatten() for values in scale.values()]).mean()
    state = None
    for begin in range(0, 50, 5):
        read = tokens[begin : begin + 6]
        by_hand.zero_grad()
        output = by_hand(read[None, :-1], state)
        state = output.state
        loss = -output_log_probabilities(by_hand, output.hidden_states[0]).gather(1, read[1:, None]).mean()
        loss.backward()
        with torch.no_grad():
            for name, parameter in by_hand.named_parameters():
                s = scale[name] / mean if optimizer == "rms" else torch.ones_like(parameter)
                divisor = s + smoothing if optimizer == "rms" else s
                gradient = parameter.grad / mean if optimizer == "rms" else parameter.grad
                drawn = (decay * s).clamp(max=1) * (trained[name] - parameter)
                parameter += drawn - rate * gradient / divisor
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(dynamic.parameters()[name], parameter.detach(), atol=1e-10, rtol=0)
        assert not torch.equal(parameter.detach(), trained[name])


def output_log_probabilities(model: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    layer = model.output_layer()
    return torch.log_softmax(hidden_states @ layer.weight.T + layer.bias, dim=-1)
