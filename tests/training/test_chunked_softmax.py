"""The whole softmax in pieces against autograd on the whole matrix of logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mbpa_lm.models.base import OutputLayer
from mbpa_lm.training.chunked_softmax import chunked_cross_entropy, target_losses

V, N, D = 50, 23, 7


def problem(bias: bool, dtype: torch.dtype, scale: float = 1.0) -> tuple[OutputLayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = (torch.randn(V, D, dtype=dtype) * scale).requires_grad_()
    layer = OutputLayer(weight, torch.randn(V, dtype=dtype).requires_grad_() if bias else None)
    return layer, torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randint(0, V, (N,))


def gradients(loss: torch.Tensor, layer: OutputLayer, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    inputs = [hidden_states, layer.weight, *([] if layer.bias is None else [layer.bias])]
    return list(torch.autograd.grad(3 * loss, inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [1, 4, 23, 1000])
def test_loss_and_gradients_are_those_of_the_whole_matrix(bias: bool, positions: int) -> None:
    layer, hidden_states, targets = problem(bias, torch.float64)
    loss = chunked_cross_entropy(layer, hidden_states, targets, torch.float64, positions * V)
    expected = cross_entropy(layer.logits(hidden_states), targets)
    torch.testing.assert_close(loss, expected)
    for own, right in zip(gradients(loss, layer, hidden_states), gradients(expected, layer, hidden_states), strict=True):
        torch.testing.assert_close(own, right)


def test_losses_of_targets_are_those_of_the_whole_matrix() -> None:
    layer, hidden_states, targets = problem(True, torch.float32)
    expected = cross_entropy(layer.logits(hidden_states), targets, reduction="none")
    torch.testing.assert_close(target_losses(layer, hidden_states, targets, torch.float32), expected)


def test_in_half_precision_gradients_are_as_near_as_autograds() -> None:
    layer, hidden_states, targets = problem(True, torch.float32)
    exact = gradients(cross_entropy(layer.logits(hidden_states), targets), layer, hidden_states)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = gradients(cross_entropy(layer.logits(hidden_states), targets), layer, hidden_states)
        loss = chunked_cross_entropy(layer, hidden_states, targets, torch.bfloat16, 4 * V)
    assert loss.dtype == torch.float32
    for own, other, right in zip(gradients(loss, layer, hidden_states), automatic, exact, strict=True):
        assert own.dtype == torch.float32
        assert (own - right).norm() < 2 * (other - right).norm() + 1e-6


def test_a_target_that_seems_impossible_gives_a_finite_loss_and_the_full_gradient() -> None:
    layer, hidden_states, targets = problem(True, torch.float32, scale=1000.0)
    loss = chunked_cross_entropy(layer, hidden_states, targets, torch.float32)
    expected = cross_entropy(layer.logits(hidden_states), targets)
    assert torch.isfinite(loss)
    for own, right in zip(gradients(loss, layer, hidden_states), gradients(expected, layer, hidden_states), strict=True):
        torch.testing.assert_close(own, right)
