"""The loss that is fitted against the dual solver, and what gradient descent finds on problems whose answer is known."""

import math

import torch

from mbpa_lm.adaptation import dual
from mbpa_lm.adaptation.fitting import (
    Examples,
    Fit,
    adapted_losses,
    fit_by_gradient_descent,
    mixed_losses,
    of_targets,
    prepare_examples,
    typical_squared_distance,
)
from mbpa_lm.adaptation.kernels import gaussian, inverse_distance, stretched_distances, within_reach
from mbpa_lm.adaptation.problem import Problem
from mbpa_lm.adaptation.rule import AdaptationRule

DOUBLE = {"dtype": torch.float64}


def random_examples(N: int, n: int, V: int, d: int) -> tuple[Problem, torch.Tensor, Examples]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(N, n, d, generator=generator, **DOUBLE)
    queries = torch.randn(N, d, generator=generator, **DOUBLE)
    values = torch.randint(0, V, (N, n), generator=generator)
    layer = torch.randn(V, d, generator=generator, **DOUBLE), torch.randn(V, generator=generator, **DOUBLE)
    problem = Problem(*layer, keys, values, torch.full((N, n), 1 / n, **DOUBLE), queries).with_base(V)
    targets = torch.randint(0, V, (N,), generator=generator)
    absent = torch.zeros(N, n, dtype=torch.bool)
    return problem, targets, prepare_examples(problem, targets, absent, adapt_bias=True)


def make_fit(steps: list[float], beta: float, width: float, reach: float, metric: torch.Tensor, share: float = 0.5) -> Fit:
    return Fit(
        *(torch.tensor(value, **DOUBLE).log() for value in (steps, beta, width, reach)),
        metric.log(),
        torch.tensor(share, **DOUBLE).logit(),
    )


def test_the_loss_is_the_dual_solver_s() -> None:
    problem, targets, examples = random_examples(6, 9, 20, 4)
    metric = torch.tensor([0.5, 1.0, 2.0, 1.5], **DOUBLE)
    typical = typical_squared_distance(examples)
    fit = make_fit([0.1, 0.2, 0.05], 0.3, 0.7, 1.2, metric, share=0.3)
    distances = stretched_distances(problem.keys_BKd, problem.queries_Bd, metric)
    nearest = distances.topk(5, largest=False).indices
    rows = torch.arange(6)[:, None]
    for is_gaussian in (False, True):
        kernel = gaussian(math.sqrt(0.35 * typical)) if is_gaussian else inverse_distance(0.7 * typical)
        weights = within_reach(kernel, 1.2 * math.sqrt(typical))(distances[rows, nearest])
        few = Problem(
            problem.weight_Vd,
            problem.bias_V,
            problem.keys_BKd[rows, nearest],
            problem.values_BK[rows, nearest],
            weights,
            problem.queries_Bd,
        )
        expected = dual.solve(few, AdaptationRule(3, 1.0, 0.3, schedule=(0.1, 0.2, 0.05)), targets)
        found = adapted_losses(examples, fit, 5, typical, is_gaussian, math.inf)
        torch.testing.assert_close(found, -expected, atol=1e-8, rtol=0)
        mixed = mixed_losses(examples, fit, 5, typical, is_gaussian, math.inf)
        base = torch.log_softmax(problem.queries_Bd @ problem.weight_Vd.T + problem.bias_V, dim=1)[rows[:, 0], targets]
        torch.testing.assert_close(of_targets(examples), base, atol=1e-8, rtol=0)
        torch.testing.assert_close((-mixed).exp(), 0.3 * expected.exp() + 0.7 * base.exp(), atol=1e-8, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    _, _, examples = random_examples(5, 6, 15, 3)
    fit = make_fit([0.1, 0.2], 0.3, 0.7, 1.2, torch.ones(3, **DOUBLE))
    parameters = [parameter.clone().requires_grad_() for parameter in fit.parameters()]
    assert torch.autograd.gradcheck(
        lambda *tensors: mixed_losses(examples, Fit(*tensors), 6, 4.0, False, math.inf).sum(), parameters
    )


def test_descent_lowers_the_loss_and_leaves_the_start_alone() -> None:
    _, _, examples = random_examples(80, 6, 15, 3)
    start = make_fit([8.0] * 3, 1e-3, 0.1, 3.0, torch.ones(3, **DOUBLE))  # far too long a step
    before = [parameter.clone() for parameter in start.parameters()]
    means = [float(mixed_losses(examples, start, 6, 4.0, False, math.inf).mean())]
    fit_by_gradient_descent(
        start,
        lambda fit, rows: mixed_losses(examples.rows(rows), fit, 6, 4.0, False, math.inf),
        examples=80,
        epochs=8,
        batch_size=16,
        learning_rate=0.5,
        on_epoch=lambda epoch, fit: means.append(float(mixed_losses(examples, fit, 6, 4.0, False, math.inf).mean().detach())),
    )
    assert len(means) == 9
    assert means[-1] < means[0] - 0.1
    assert all(torch.equal(one, other) for one, other in zip(before, start.parameters(), strict=True))


def test_a_metric_learns_which_directions_tell_the_next_word() -> None:
    generator = torch.Generator().manual_seed(0)
    N, n, d = 200, 8, 2
    keys, queries = torch.randn(N, n, d, generator=generator, **DOUBLE), torch.randn(N, d, generator=generator, **DOUBLE)
    values, targets = (keys[..., 0] > 0).long(), (queries[:, 0] > 0).long()  # the second direction is noise
    layer = torch.zeros(2, d, **DOUBLE), torch.zeros(2, **DOUBLE)
    problem = Problem(*layer, keys, values, torch.full((N, n), 1 / n, **DOUBLE), queries).with_base(2)
    examples = prepare_examples(problem, targets, torch.zeros(N, n, dtype=torch.bool), adapt_bias=True)
    kept: list[Fit] = []
    start = make_fit([0.5], 1e-3, 1.0, 3.0, torch.ones(d, **DOUBLE))
    fit_by_gradient_descent(
        start,
        lambda fit, rows: mixed_losses(examples.rows(rows), fit, 4, 2.0, True, math.inf),
        N,
        10,
        20,
        0.05,
        lambda _, fit: kept.append(fit.detached()),
    )
    first, second = kept[-1].log_metric_d.tolist()
    assert first > second + 0.5


def test_no_step_is_longer_than_the_longest() -> None:
    fit = make_fit([0.1, 0.2, 0.05], 0.3, 0.7, 1.2, torch.ones(3, **DOUBLE))
    torch.testing.assert_close(fit.step_sizes(0.15), torch.tensor([0.1, 0.15, 0.05], **DOUBLE))
