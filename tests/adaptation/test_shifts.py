"""Logits changed in place are those of the restricted solver, up to a number that all words share."""

from dataclasses import replace

import pytest
import torch

from mbpa_lm.adaptation import restricted
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.errors import AdaptationError
from tests.adaptation.problems import base_log_probabilities, near_problem, random_problem


@pytest.mark.parametrize("tolerance", [1e9, 0.1, 1e-3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_the_solver_s(dtype: torch.dtype, softcap: float | None, tolerance: float) -> None:
    problem = replace(near_problem(300, 40, dtype), softcap=softcap).with_base(40)
    rule = AdaptationRule(10, 0.1)
    assert problem.base is not None
    logits = problem.base.log_probabilities_BV + 3
    bounds, widened = restricted.add_shifts(problem, rule, logits, 16, tolerance)
    expected = restricted.solve_with_bounds(problem, rule, None, 16, tolerance)
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_probabilities, atol=2e-5, rtol=0)
    assert torch.equal(widened, expected.widened_B)
    torch.testing.assert_close(bounds, expected.bounds_B)
    assert (not widened.any()) if tolerance > 1 else (widened.any() if tolerance < 1e-2 else True)


def test_words_that_nothing_moves_keep_their_logits_to_the_bit() -> None:
    problem = random_problem(3, 6, 400, 5, 0, dtype=torch.float32, likely=10)
    logits = base_log_probabilities(problem)
    before = logits.clone()
    restricted.add_shifts(problem, AdaptationRule(5, 0.05), logits, 16, 1e9)
    moved = (logits != before).sum(1)
    assert bool(((moved > 0) & (moved <= 6 + 6 * 10)).all())


def test_neighbours_of_no_weight_change_nothing() -> None:
    problem = random_problem(3, 6, 50, 5, 0, dtype=torch.float32)
    problem = replace(problem, weights_BK=torch.zeros_like(problem.weights_BK))
    logits = base_log_probabilities(problem)
    before = logits.clone()
    restricted.add_shifts(problem, AdaptationRule(5, 0.5), logits)
    assert torch.equal(logits, before)


def test_steps_that_leave_the_span_are_refused() -> None:
    problem = random_problem(1, 2, 9, 3, 0)
    with pytest.raises(AdaptationError, match="restricted"):
        restricted.add_shifts(problem, AdaptationRule(5, 0.5, optimizer="adam"), base_log_probabilities(problem))
