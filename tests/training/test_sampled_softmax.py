import pytest
import torch
from torch.nn.functional import cross_entropy

from mbpa_lm.models.base import OutputLayer
from mbpa_lm.training.sampled_softmax import inclusion_probabilities, sampled_cross_entropy

COUNTS = 10_000 // torch.arange(1, 501)


def problem(bias: bool = True) -> tuple[OutputLayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(500, 20, requires_grad=True)
    layer = OutputLayer(weight, torch.randn(500, requires_grad=True) if bias else None)
    return layer, torch.randn(40, 20) * 0.3, torch.randint(0, 500, (40,))


@pytest.mark.parametrize("expected", [1, 50, 200, 499, 500, 600])
def test_as_many_words_are_drawn_as_asked_for_and_frequent_ones_rather(expected: int) -> None:
    inclusion = inclusion_probabilities(COUNTS, expected)
    assert float(inclusion.sum()) == pytest.approx(min(expected, 500), rel=1e-5)
    assert (inclusion[1:] <= inclusion[:-1]).all()
    assert float(inclusion.min()) > 0
    assert float(inclusion.max()) <= 1


@pytest.mark.parametrize("bias", [True, False])
def test_with_every_word_drawn_it_is_the_softmax(bias: bool) -> None:
    layer, hidden_states, targets = problem(bias)
    losses = sampled_cross_entropy(layer, hidden_states, targets, torch.ones(500))
    expected = cross_entropy(layer.logits(hidden_states), targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), layer.weight, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), layer.weight)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


def test_the_estimate_of_the_sum_is_unbiased() -> None:
    layer, hidden_states, targets = problem()
    inclusion = inclusion_probabilities(COUNTS, 100)
    with torch.no_grad():
        logits = layer.logits(hidden_states)
        own = logits.gather(1, targets[:, None])[:, 0]
        draws = torch.stack(
            [(sampled_cross_entropy(layer, hidden_states, targets, inclusion) + own).exp() for _ in range(3000)]
        )
    standard_error = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - logits.logsumexp(-1).exp()).abs() < 5 * standard_error).all()
