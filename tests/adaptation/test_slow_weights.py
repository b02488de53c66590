"""The slowly adapted layer against its own equation, one number at a time."""

import math

import pytest
import torch

from mbpa_lm.adaptation import slow_weights
from mbpa_lm.adaptation.slow_weights import GradientScale, GradientStatistics, SlowRule, SlowWeights
from mbpa_lm.errors import AdaptationError

DOUBLE = {"dtype": torch.float64}


def random_layer(V: int, d: int, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None, GradientScale]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, d, generator=generator, **DOUBLE)
    scale = torch.rand(V, d, generator=generator, **DOUBLE)
    if not bias:
        return weight, None, GradientScale(scale, None)
    bias_scale = torch.rand(V, generator=generator, **DOUBLE)
    return weight, torch.randn(V, generator=generator, **DOUBLE), GradientScale(scale, bias_scale)


def random_positions(n: int, V: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, d, generator=generator, **DOUBLE), torch.randint(0, V, (n,), generator=generator)


def read(slow: SlowWeights, hidden_states: torch.Tensor, targets: torch.Tensor, piece: int) -> torch.Tensor:
    """Predict and learn in pieces as long as the schedule allows."""
    found, begin = [], 0
    while begin < len(targets):
        end = begin + min(piece, slow.positions_to_next_step(), len(targets) - begin)
        log_probabilities, _ = slow.log_probabilities(hidden_states[begin:end])
        found.append(log_probabilities.clone())
        slow.learn(hidden_states[begin:end], log_probabilities, targets[begin:end])
        begin = end
    return torch.cat(found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_every_step_is_the_equation_s(bias: bool, piece: int) -> None:
    V, d, n, rule = 7, 5, 23, SlowRule(interval=4, rate=0.3, decay=0.4, smoothing=0.5)
    weight, offset, scale = random_layer(V, d, bias)
    hidden_states, targets = random_positions(n, V, d)
    found = read(SlowWeights(weight, offset, rule, scale), hidden_states, targets, piece)

    trained = [weight] if offset is None else [weight, offset]
    scales = [scale.weight_Vd] if scale.bias_V is None else [scale.weight_Vd, scale.bias_V]
    mean = scale.weight_Vd.mean()
    now = [tensor.clone().requires_grad_() for tensor in trained]
    for begin in range(0, n, 4):
        logits = torch.nn.functional.linear(hidden_states[begin : begin + 4], now[0], now[1] if bias else None)
        expected = torch.log_softmax(logits, dim=-1)
        torch.testing.assert_close(found[begin : begin + 4], expected.detach(), atol=1e-10, rtol=0)
        if begin + 4 > n:
            break  # an interval that is not complete is not learnt from
        loss = torch.nn.functional.cross_entropy(logits, targets[begin : begin + 4])
        gradients = torch.autograd.grad(loss, now)
        with torch.no_grad():
            for parameter, start, gradient, size in zip(now, trained, gradients, scales, strict=True):
                s = size / mean
                step = 0.3 * gradient / mean / (s + 0.5)
                parameter.add_((0.4 * s).clamp(max=1) * (start - parameter) - step)


def test_compiled_and_plain_steps_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(6, 9, generator=generator, **DOUBLE) for _ in range(4)]
    rule = SlowRule(1, 0.2, 0.9, 0.1)
    compiled = [tensor.clone() for tensor in tensors]
    slow_weights.pull(*compiled, rule, 0.7)
    monkeypatch.setattr(slow_weights, "can_take", lambda tensor: False)
    plain = [tensor.clone() for tensor in tensors]
    slow_weights.pull(*plain, rule, 0.7)
    assert not torch.equal(compiled[0], tensors[0])
    torch.testing.assert_close(plain[0], compiled[0], atol=1e-12, rtol=0)


def test_the_trained_layer_is_left_alone_and_no_rate_is_the_trained_layer() -> None:
    weight, bias, scale = random_layer(7, 5)
    before = weight.clone(), bias.clone()
    hidden_states, targets = random_positions(20, 7, 5)
    read(SlowWeights(weight, bias, SlowRule(3, 0.5, 0.1, 1.0), scale), hidden_states, targets, 2)
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])
    found = read(SlowWeights(weight, bias, SlowRule(3, 0.0, 0.1, 1.0), scale), hidden_states, targets, 2)
    expected = torch.log_softmax(torch.nn.functional.linear(hidden_states, weight, bias), -1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_decay_brings_the_trained_layer_back() -> None:
    weight, bias, scale = random_layer(7, 5)
    hidden_states, targets = random_positions(300, 7, 5)
    slow = SlowWeights(weight, bias, SlowRule(1, 0.1, 0.0, 1.0), scale)
    held = SlowWeights(weight, bias, SlowRule(1, 0.1, 1e9, 1.0), scale)  # all the way back at each step
    for one in (slow, held):
        read(one, hidden_states, targets, 1)
    assert float((held.weight_Vd - weight).norm()) < 0.1 * float((slow.weight_Vd - weight).norm())


def test_half_precision_is_read_and_single_computed() -> None:
    weight, bias, scale = random_layer(7, 5)
    slow = SlowWeights(weight.bfloat16(), bias.bfloat16(), SlowRule(2, 0.1, 0.1, 1.0), scale)
    hidden_states, targets = random_positions(8, 7, 5)
    found = read(slow, hidden_states.bfloat16(), targets, 8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(1), torch.ones(8), atol=1e-5, rtol=0)


def test_a_rate_too_large_is_reported_by_name() -> None:
    weight, bias, scale = random_layer(7, 5)
    hidden_states, targets = random_positions(60, 7, 5)
    slow = SlowWeights(weight, bias, SlowRule(1, 1e308, 0.0, 1.0), scale)
    with pytest.raises(AdaptationError, match=r"persistent adaptation diverged with persistent\.rate 1e\+308; make it smaller"):
        read(slow, 1e3 * hidden_states, targets, 1)


def test_the_scale_is_the_root_mean_square_of_the_pieces_gradients() -> None:
    weight, bias, _ = random_layer(7, 5)
    hidden_states, targets = random_positions(12, 7, 5)
    statistics, squares = GradientStatistics(weight, bias), [torch.zeros_like(weight), torch.zeros_like(bias)]
    for begin in range(0, 12, 4):
        piece = slice(begin, begin + 4)
        statistics.add(hidden_states[piece], targets[piece])
        parameters = [tensor.clone().requires_grad_() for tensor in (weight, bias)]
        loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden_states[piece], *parameters), targets[piece])
        for total, gradient in zip(squares, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient.square()
    scale = statistics.scale()
    torch.testing.assert_close(scale.weight_Vd, (squares[0] / 3).sqrt(), atol=1e-12, rtol=0)
    torch.testing.assert_close(scale.bias_V, (squares[1] / 3).sqrt(), atol=1e-12, rtol=0)


def test_text_that_repeats_is_learnt() -> None:
    weight, bias, _ = random_layer(7, 5)
    hidden_states, targets = random_positions(10, 7, 5)
    scale = GradientScale(torch.ones_like(weight), torch.ones_like(bias))
    slow = SlowWeights(weight, bias, SlowRule(10, 0.5, 0.0, 0.0), scale)
    found = read(slow, hidden_states.repeat(30, 1), targets.repeat(30), 10)
    losses = -found.gather(1, targets.repeat(30)[:, None])[:, 0]
    assert float(losses[-10:].mean()) < 0.5 * float(losses[:10].mean())
    assert math.isfinite(float(losses.max()))
