import pytest
import torch
from torch import nn

from mbpa_lm.config import TrainingConfig
from mbpa_lm.training.optimization import (
    averaged_weights,
    build_optimizer,
    learning_rate,
    load_state,
    split_state,
    start_averaging,
)

OPTIMIZERS = ["adamw", "sgd", "asgd"]


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "linear", "constant"])
def test_the_rate_rises_to_the_highest_and_falls_from_it(schedule: str) -> None:
    config = TrainingConfig(learning_rate=2.0, schedule=schedule, warmup_fraction=0.25)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert max(rates) == rates[25] == 2.0
    assert all(a < b for a, b in zip(rates[:25], rates[1:26], strict=True))
    if schedule == "constant":
        assert set(rates[25:]) == {2.0}
    else:
        assert all(a > b for a, b in zip(rates[25:], rates[26:], strict=False))
        assert 0 < rates[-1] < 0.05


def test_without_warm_up_the_first_rate_is_the_highest() -> None:
    assert learning_rate(0, 10, TrainingConfig(learning_rate=1.0, schedule="linear", warmup_fraction=0.0)) == 1.0


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_packed_and_unpacked_it_goes_on_alike(name: str) -> None:
    config = TrainingConfig(optimizer=name, learning_rate=0.1)
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    one = build_optimizer(first, config)
    steps(first, one, 3, seed=1)
    if name == "asgd":
        start_averaging(one)
    steps(first, one, 3, seed=2)
    second.load_state_dict(first.state_dict())
    two = build_optimizer(second, config)
    tensors, plain = split_state(one)
    load_state(two, {key: tensor.clone() for key, tensor in tensors.items()}, plain)
    steps(first, one, 4, seed=3)
    steps(second, two, 4, seed=3)
    assert torch.equal(first.weight, second.weight)
    with averaged_weights(one), averaged_weights(two):
        assert torch.equal(first.weight, second.weight)


def test_state_of_another_model_is_refused() -> None:
    config = TrainingConfig()
    one = build_optimizer(model := nn.Linear(3, 2), config)
    steps(model, one, 1, seed=0)
    with pytest.raises(ValueError, match=r"0\.exp_avg is of torch\.float32 and \(2, 3\), for a weight of \(4, 3\)"):
        load_state(build_optimizer(nn.Linear(3, 4), config), *split_state(one))


def test_averaged_weights_are_the_mean_since_averaging_began() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, TrainingConfig(optimizer="asgd", learning_rate=0.1, weight_decay=0.0))
    steps(model, optimizer, 2, seed=0)
    start_averaging(optimizer)
    seen = []
    for step in range(4):
        steps(model, optimizer, 1, seed=10 + step)
        seen.append(model.weight.detach().clone())
    with averaged_weights(optimizer):
        averaged = model.weight.detach().clone()
    assert torch.equal(model.weight, seen[-1])
    torch.testing.assert_close(averaged, torch.stack(seen[1:]).mean(0))  # PyTorch counts from the second step on
