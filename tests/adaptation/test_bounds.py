"""The restricted solver's bound of its own error, and what it does where the bound is exceeded."""

import math
from dataclasses import replace

import pytest
import torch

from mbpa_lm.adaptation import dual, restricted
from mbpa_lm.adaptation.problem import Problem, TrainedSoftmax
from mbpa_lm.adaptation.rule import AdaptationRule
from tests.adaptation.problems import (
    near_problem,
    random_problem,
)

RULES = [
    *(AdaptationRule(steps, alpha) for steps in (1, 3, 10) for alpha in (0.01, 0.05, 0.2)),
    *(AdaptationRule(10, 0.01, 0.1, "momentum"), AdaptationRule(30, 0.05, 0.1)),
]


def errors_and_bounds(
    problem: Problem, rule: AdaptationRule, moved: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far each query's log-probabilities are from the dual solver's, at most, and the reported bounds."""
    solution = restricted.solve_with_bounds(problem, rule, None, moved, tolerance)
    return (solution.log_probabilities - dual.solve(problem, rule)).abs().amax(1), solution.bounds_B


def test_no_error_is_above_its_bound() -> None:
    checked, broken = 0, []
    for seed in range(4):
        for likely, moved in ((0, 8), (8, 0), (40, 4), (40, 30), (200, 4)):
            problem = random_problem(8, 1 + 2 * seed, 200, 6, seed, bias=seed % 2 == 0, likely=likely)
            for rule in RULES:
                errors, bounds = errors_and_bounds(problem, rule, moved, math.inf)
                told = bounds <= 0.1
                checked += int(told.sum())
                broken += (errors - bounds)[told & (errors > bounds + 1e-6)].tolist()
    assert checked > 300
    assert not broken


def test_the_bound_holds_at_a_query_that_is_hardly_like_its_neighbour() -> None:
    double = {"dtype": torch.float64}
    problem = Problem(
        weight_Vd=torch.zeros(10, 2, **double),
        bias_V=None,
        keys_BKd=torch.tensor([[[3.0, 0.0]]], **double),  # its scalar product with itself is 9, with the query 0.1
        values_BK=torch.tensor([[0]]),
        weights_BK=torch.ones(1, 1, **double),
        queries_Bd=torch.tensor([[1 / 30, 1.0]], **double),
    ).with_base(10)
    errors, bounds = errors_and_bounds(problem, AdaptationRule(10, 0.05), 0, math.inf)
    assert float(errors) <= float(bounds) + 1e-6  # 1.4e-3 and 1.3e-5


@pytest.mark.parametrize(("V", "likely"), [(3000, 0), (3000, 30), (3000, 200), (500, 20)])
def test_no_error_is_above_its_bound_where_neighbours_are_near_and_lists_are_short(V: int, likely: int) -> None:
    checked = 0
    for moved in (0, 4, 16, 60):
        for rule in RULES:
            errors, bounds = errors_and_bounds(near_problem(V, likely), rule, moved, math.inf)
            told = bounds <= 0.1
            checked += int(told.sum())
            assert bool((errors <= bounds + 1e-6)[told].all())
    assert checked > 20  # without any listed word few bounds are small


@pytest.mark.parametrize("likely", [0, 1, 30, 100])
def test_a_small_tolerance_widens_every_query_until_it_is_met(likely: int) -> None:
    problem, rule = near_problem(3000, likely), AdaptationRule(10, 0.05)
    unwidened = restricted.solve_with_bounds(problem, rule, None, 4, math.inf)
    for tolerance in (1e-2, 1e-4, 1e-7):
        solution = restricted.solve_with_bounds(problem, rule, None, 4, tolerance)
        assert torch.equal(solution.widened_B, unwidened.bounds_B > tolerance)
        assert bool((solution.bounds_B <= tolerance).all())
        torch.testing.assert_close(solution.log_probabilities, dual.solve(problem, rule), atol=tolerance, rtol=0)
        kept = ~solution.widened_B
        assert torch.equal(solution.log_probabilities[kept], unwidened.log_probabilities[kept])
    assert bool(solution.widened_B.all())
    targets = problem.values_BK[:, 0]
    of_targets = restricted.solve_with_bounds(problem, rule, targets, 4, tolerance)
    expected = solution.log_probabilities.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(of_targets.log_probabilities, expected, atol=1e-9, rtol=0)
    assert torch.equal(of_targets.widened_B, solution.widened_B)


def test_only_some_queries_are_widened_and_the_others_stay() -> None:
    problem, rule = near_problem(3000, 30), AdaptationRule(10, 0.05)
    unwidened = restricted.solve_with_bounds(problem, rule, None, 16, math.inf)
    middle = float(unwidened.bounds_B.median())
    solution = restricted.solve_with_bounds(problem, rule, None, 16, middle)
    assert 5 < int(solution.widened_B.sum()) < 15
    exact, widened = dual.solve(problem, rule), solution.widened_B
    assert torch.equal(solution.log_probabilities[~widened], unwidened.log_probabilities[~widened])
    before, after = ((one.log_probabilities - exact)[widened].abs().amax() for one in (unwidened, solution))
    assert float(after) < 0.5 * float(before)


@pytest.mark.parametrize(("V", "likely"), [(40, 10), (500, 20), (3000, 30), (30_000, 96)])
@pytest.mark.parametrize("slow", [False, True])
def test_to_the_bit_a_query_gets_what_it_gets_alone(V: int, likely: int, slow: bool) -> None:
    """Those beside it may be of the future: neither their words nor how many of them are widened may be felt."""
    problem, rule = near_problem(V, likely, torch.float32), AdaptationRule(10, 0.05)
    if slow:
        problem = from_slow_weights(problem)
    for tolerance in (math.inf, 0.1, 1e-2, 1e-6):
        together = restricted.solve_with_bounds(problem, rule, None, 4, tolerance)
        for row in range(0, 20, 3):
            alone = restricted.solve_with_bounds(problem.rows(slice(row, row + 1)), rule, None, 4, tolerance)
            assert torch.equal(alone.log_probabilities[0], together.log_probabilities[row])
            assert alone.bounds_B[0] == together.bounds_B[row]


def from_slow_weights(problem: Problem) -> Problem:
    """The same neighbours, under a layer that has moved away a little from the trained one."""
    trained = problem.base
    generator = torch.Generator().manual_seed(1)
    weight = problem.weight_Vd + 0.1 * torch.randn(problem.weight_Vd.shape, generator=generator)
    logits = torch.nn.functional.linear(problem.queries_Bd, weight, problem.bias_V)
    at_queries = torch.nn.functional.linear(problem.queries_Bd, problem.weight_Vd, problem.bias_V)
    before = TrainedSoftmax(problem.weight_Vd, problem.bias_V, trained.log_probabilities_BV, at_queries.logsumexp(1))
    base = replace(trained, log_probabilities_BV=logits.log_softmax(1), log_partitions_B=logits.logsumexp(1), trained=before)
    return replace(problem, weight_Vd=weight, base=base)


@pytest.mark.parametrize("likely", [0, 1, 30])
def test_an_infinite_tolerance_never_widens(likely: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted, "_solve_wider", lambda *_: pytest.fail("widened"))
    for alpha in (0.05, 1e3):
        solution = restricted.solve_with_bounds(near_problem(500, likely), AdaptationRule(10, alpha), None, 2, math.inf)
        assert not bool(solution.widened_B.any())
        assert float(solution.bounds_B.min()) > 0


@pytest.mark.parametrize(("V", "likely"), [(1, 1), (1, 0), (2, 1), (3, 3), (5, 2), (30_000, 0), (30_000, 96)])
def test_vocabularies_of_any_size(V: int, likely: int) -> None:
    problem, rule = near_problem(V, likely), AdaptationRule(5, 0.05)
    exact = dual.solve(problem, rule)
    for moved, tolerance in ((0, math.inf), (16, 1e-3), (16, 1e-9)):
        solution = restricted.solve_with_bounds(problem, rule, None, moved, tolerance)
        if tolerance < 1:
            torch.testing.assert_close(solution.log_probabilities, exact, atol=tolerance, rtol=0)
        torch.testing.assert_close(solution.log_probabilities.exp().sum(1), torch.ones(20, dtype=torch.float64))


def test_int32_and_int64_lists_are_the_same_problem() -> None:
    problem, rule = near_problem(500, 20), AdaptationRule(5, 0.05)
    base = replace(problem.base, likely_words_BKc=problem.base.likely_words_BKc.int())
    expected, found = (restricted.solve_with_bounds(one, rule) for one in (problem, replace(problem, base=base)))
    assert torch.equal(found.log_probabilities, expected.log_probabilities)
    assert torch.equal(found.bounds_B, expected.bounds_B)
