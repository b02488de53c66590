"""What is stored in half precision is read as it is and computed with in single precision."""

import math
from dataclasses import replace

import pytest
import torch

from mbpa_lm.adaptation import restricted
from mbpa_lm.adaptation.problem import Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from tests.adaptation.problems import (
    SOLVERS,
    random_problem,
)

HALF = torch.bfloat16


def stored_in_half_precision(problem: Problem) -> tuple[Problem, Problem]:
    """Return the problem with layer, keys and queries in bfloat16, and the same numbers in float32."""
    names = ("weight_Vd", "keys_BKd", "queries_Bd", *(["bias_V"] if problem.bias_V is not None else []))
    half = replace(problem, **{name: getattr(problem, name).to(HALF) for name in names}, base=None)
    half = replace(half, weights_BK=half.weights_BK.float())
    upcast = replace(half, **{name: getattr(half, name).float() for name in names})
    return half, upcast


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_half_precision_is_read_as_it_is_and_computed_with_in_single_precision(solver: str, optimizer: str, bias: bool) -> None:
    half, upcast = stored_in_half_precision(random_problem(5, 6, 300, 8, 0, bias))
    rule, targets = AdaptationRule(10, 0.03, 0.1, optimizer), torch.tensor([7, 0, 299, 1, 1])
    half, upcast = half.with_base(40), upcast.with_base(40)
    found, expected = SOLVERS[solver](half, rule), SOLVERS[solver](upcast, rule)
    assert found.dtype == torch.float32
    assert (expected - upcast.base.log_probabilities_BV).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    of_targets = SOLVERS[solver](half, rule, targets)
    assert of_targets.dtype == torch.float32
    torch.testing.assert_close(of_targets, expected.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tolerance", [1e-6, math.inf])
def test_half_precision_is_widened_like_single_precision(tolerance: float) -> None:
    half, upcast = (problem.with_base(4) for problem in stored_in_half_precision(random_problem(5, 6, 900, 8, 0)))
    rule = AdaptationRule(10, 0.03, 0.1)
    found, expected = (restricted.solve_with_bounds(problem, rule, None, 3, tolerance) for problem in (half, upcast))
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities, atol=1e-4, rtol=0)
    assert torch.equal(found.widened_B, expected.widened_B)


@pytest.mark.parametrize("of_targets", [True, False])
def test_what_a_model_in_half_precision_gives_can_be_adapted(of_targets: bool) -> None:
    # What scoring passes on: the base model's log-probabilities and a memory's likely probabilities in bfloat16 too.
    half, _ = stored_in_half_precision(random_problem(5, 6, 300, 8, 0))
    exact = half.with_base(40).base
    base = replace(
        exact,
        log_probabilities_BV=exact.log_probabilities_BV.to(HALF),
        likely_words_BKc=exact.likely_words_BKc.int(),
        likely_probabilities_BKc=exact.likely_probabilities_BKc.to(HALF),
    )
    rule, targets = AdaptationRule(10, 0.03), torch.tensor([7, 0, 299, 1, 1]) if of_targets else None
    found = restricted.solve(replace(half, base=base), rule, targets, tolerance=math.inf)
    expected = restricted.solve(half.with_base(40), rule, targets, tolerance=math.inf)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0, rtol=2**-7)  # the steps of bfloat16
