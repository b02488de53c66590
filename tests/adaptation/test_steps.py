"""The compiled steps of single precision against PyTorch's in double precision."""

import pytest
import torch

from mbpa_lm.adaptation.steps import shift_at, take_steps

B, K, S = 5, 7, 19


def random_arguments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.log_softmax(3 * torch.randn(B, K, S, generator=generator), -1)
    keys = torch.randn(B, K, 6, generator=generator)
    weights = torch.rand(B, K, generator=generator) / K
    return logits, keys @ keys.mT + 1, weights, torch.randint(0, S - 1, (B, K), generator=generator)


@pytest.mark.parametrize("frozen_last", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [[0.7], [0.05] * 10, [1.0, 0.0, 0.5]])
def test_compiled_steps_are_those_in_double_precision(sizes: list[float], beta: float, frozen_last: bool) -> None:
    logits, gram, weights, values = random_arguments()
    towards = gram[:, 0]
    found = take_steps(logits, gram, weights, values, sizes, beta, frozen_last=frozen_last)
    expected = take_steps(logits.double(), gram.double(), weights.double(), values, sizes, beta, frozen_last=frozen_last)
    found_shift = shift_at(towards, weights, values, found, S)
    expected_shift = shift_at(towards.double(), weights.double(), values, expected, S)
    torch.testing.assert_close(found_shift.double(), expected_shift, rtol=1e-5, atol=1e-5)
    assert found.probabilities_BKS is not None
    assert expected.probabilities_BKS is not None
    torch.testing.assert_close(found.probabilities_BKS[..., -1].double(), expected.probabilities_BKS[..., -1])


def test_a_gradient_flows_where_one_is_asked_for() -> None:
    logits, gram, weights, values = random_arguments()
    alpha = torch.tensor(0.1, requires_grad=True)
    steps = take_steps(logits, gram, weights, values, [alpha] * 3)
    shift_at(gram[:, 0], weights, values, steps, S).square().sum().backward()
    assert alpha.grad is not None
    assert float(alpha.grad) != 0


def test_impossible_words_stay_impossible() -> None:
    logits, gram, weights, values = random_arguments()
    logits[:, :, 3] = -torch.inf
    values[values == 3] = 4
    steps = take_steps(logits, gram, weights, values, [0.5] * 4)
    assert steps.probabilities_BKS is not None
    assert float(steps.probabilities_BKS[:, :, 3].abs().max()) < 1e-30


def test_numbers_that_overflow_are_not_hidden() -> None:
    logits, gram, weights, values = random_arguments()
    steps = take_steps(logits, gram, weights, values, [3e38] * 3)
    assert not bool(torch.isfinite(shift_at(gram[:, 0], weights, values, steps, S)).all())


def test_numbers_that_are_none_are_not_hidden() -> None:
    logits, gram, weights, values = random_arguments()
    logits[1, 2, 3] = torch.nan
    shift = shift_at(gram[:, 0], weights, values, take_steps(logits, gram, weights, values, [0.5] * 3), S)
    assert bool(torch.isnan(shift[1]).all())
    assert bool(torch.isfinite(shift[0]).all())
