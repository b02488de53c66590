"""Every solver against the reference, and the reference against the formulas."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.errors import AdaptationError
from tests.adaptation.problems import (
    EXACT_SOLVERS,
    SOLVERS,
    base_log_probabilities,
    random_problem,
    without_restriction,
)


@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(1, 6), st.integers(0, 9)),
    *(st.integers(0, 50), st.floats(0.0, 0.5), st.floats(0.0, 1.0), st.booleans(), st.booleans()),
)
def test_dual_and_unrestricted_are_the_reference(
    B: int, K: int, V: int, d: int, seed: int, steps: int, alpha: float, beta: float, bias: bool, adapt_bias: bool
) -> None:
    problem = random_problem(B, K, V, d, seed, bias)
    rule = AdaptationRule(steps, alpha, beta, adapt_bias=adapt_bias)
    expected = reference.solve(problem, rule)
    torch.testing.assert_close(dual.solve(problem, rule), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(without_restriction(problem, rule), expected, atol=1e-8, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 9)),
    *(st.integers(0, 50), st.floats(0.0, 0.05), st.floats(0.0, 1.0), st.floats(0.0, 0.95), st.booleans(), st.booleans()),
)
def test_momentum_and_schedules_are_the_reference_s(
    B: int, K: int, V: int, d: int, seed: int, steps: int, alpha: float, beta: float, momentum: float, bias: bool, even: bool
) -> None:
    problem = random_problem(B, K, V, d, seed, bias)
    shares = torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).tolist()
    rule = AdaptationRule(steps, alpha, beta, "momentum", momentum, schedule=None if even else tuple(shares))
    for rule_or_plain in (rule, replace(rule, optimizer="sgd")):
        expected = reference.solve(problem, rule_or_plain)
        torch.testing.assert_close(dual.solve(problem, rule_or_plain), expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(without_restriction(problem, rule_or_plain), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_added_to_capped_logits(bias: bool) -> None:
    problem = replace(random_problem(4, 6, 30, 5, 0, bias), softcap=1.5).with_base(30)
    rule = AdaptationRule(10, 0.2, 0.1)
    expected = reference.solve(problem, rule)
    torch.testing.assert_close(dual.solve(problem, rule), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(without_restriction(problem, rule), expected, atol=1e-8, rtol=0)
    assert (expected - reference.solve(replace(problem, softcap=None), rule)).abs().max() > 0.1
    layer = torch.nn.functional.linear(problem.queries_Bd, problem.weight_Vd, problem.bias_V)
    at_rest = dual.solve(problem, AdaptationRule(0, 0.2))
    torch.testing.assert_close(at_rest, torch.log_softmax(1.5 * torch.tanh(layer / 1.5), dim=-1))


Update = Callable[[int, float, list[torch.Tensor]], torch.Tensor]


def momentum_update(step: int, size: float, gradients: list[torch.Tensor], kept: float = 0.9) -> torch.Tensor:
    return size * sum(kept ** (step - past) * gradients[past] for past in range(step + 1))


def rmsprop_update(step: int, size: float, gradients: list[torch.Tensor]) -> torch.Tensor:
    mean_square = sum(0.01 * 0.99 ** (step - past) * gradients[past].square() for past in range(step + 1))
    return size * gradients[step] / (mean_square.sqrt() + 1e-8)


def adam_update(step: int, size: float, gradients: list[torch.Tensor]) -> torch.Tensor:
    mean = sum(0.1 * 0.9 ** (step - past) * gradients[past] for past in range(step + 1)) / (1 - 0.9 ** (step + 1))
    mean_square = sum(0.001 * 0.999 ** (step - past) * gradients[past].square() for past in range(step + 1))
    return size * mean / ((mean_square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)


UPDATES: dict[str, Update] = {
    "sgd": lambda step, size, gradients: size * gradients[step],
    "momentum": momentum_update,
    "rmsprop": rmsprop_update,
    "adam": adam_update,
}


def solve_by_formula(problem: Problem, rule: AdaptationRule) -> torch.Tensor:
    """Take the steps with gradients and updates written out, the bias as a column of the weight; one query after another."""
    bias = torch.zeros(len(problem.weight_Vd)).to(problem.weight_Vd) if problem.bias_V is None else problem.bias_V
    origin = torch.cat([problem.weight_Vd, bias[:, None]], dim=1)
    adapts_bias = rule.adapt_bias and problem.bias_V is not None
    adapted = []
    for keys, values, weights, query in zip(
        problem.keys_BKd, problem.values_BK, problem.weights_BK, problem.queries_Bd, strict=True
    ):
        inputs = torch.nn.functional.pad(keys, (0, 1), value=1.0)
        wanted = torch.nn.functional.one_hot(values, len(origin)).to(origin)
        layer, gradients = origin.clone(), []
        for step, size in enumerate(rule.step_sizes()):
            errors = torch.softmax(inputs @ layer.T, dim=1) - wanted
            gradients.append((weights[:, None] * errors).T @ inputs + rule.beta * (layer - origin))
            if not adapts_bias:
                gradients[-1][:, -1] = 0
            layer = layer - UPDATES[rule.optimizer](step, size, gradients)
        adapted.append(torch.log_softmax(layer @ torch.nn.functional.pad(query, (0, 1), value=1.0), dim=0))
    return torch.stack(adapted)


@pytest.mark.parametrize("adapt_bias", [True, False])
@pytest.mark.parametrize("schedule", [None, (1.0, 0.5, 2.0, 0.0, 0.1, 1.0, 1.0)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", UPDATES)
def test_the_reference_takes_the_steps_that_the_formulas_say(
    optimizer: str, beta: float, schedule: tuple[float, ...] | None, adapt_bias: bool
) -> None:
    for bias in (True, False):
        problem = random_problem(3, 5, 9, 4, 0, bias)
        rule = AdaptationRule(7, 0.05, beta, optimizer, adapt_bias=adapt_bias, schedule=schedule)
        expected = solve_by_formula(problem, rule)
        assert (expected - base_log_probabilities(problem)).abs().max() > 0.05
        torch.testing.assert_close(reference.solve(problem, rule), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", ["dual", "restricted"])
def test_single_precision_and_turns(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, rule = random_problem(7, 8, 40, 16, 0, dtype=torch.float32), AdaptationRule(10, 0.1, 0.1)
    expected = reference.solve(problem, rule)
    torch.testing.assert_close(EXACT_SOLVERS[solver](problem, rule), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(dual, "NUMBERS_AT_ONCE", 2 * 8 * 40)
    monkeypatch.setattr(restricted, "QUERIES_AT_ONCE", 2)
    torch.testing.assert_close(EXACT_SOLVERS[solver](problem, rule), expected, atol=1e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 9), st.integers(1, 60), st.integers(1, 6), st.integers(0, 9)),
    *(st.integers(0, 12), st.floats(0.0, 50.0), st.integers(0, 70), st.integers(0, 70)),
)
def test_restricted_distributions_sum_to_one_whatever_is_left_out(
    B: int, K: int, V: int, d: int, seed: int, steps: int, alpha: float, likely: int, moved: int
) -> None:
    problem, rule = random_problem(B, K, V, d, seed, likely=likely), AdaptationRule(steps, alpha)
    adapted = restricted.solve(problem, rule, moved_words=moved, tolerance=math.inf)
    assert torch.isfinite(adapted).all()
    torch.testing.assert_close(adapted.exp().sum(-1), torch.ones(B, dtype=torch.float64), atol=1e-9, rtol=0)
    targets = torch.arange(B) % V
    of_targets = restricted.solve(problem, rule, targets, moved_words=moved, tolerance=math.inf)
    torch.testing.assert_close(of_targets, adapted.gather(1, targets[:, None])[:, 0], atol=1e-9, rtol=1e-9)


def peaked_problem(dtype: torch.dtype) -> Problem:
    """Keys and queries at which a few words have all the mass, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 24, generator=generator, dtype=torch.float64)
    keys = 3 * torch.randn(30, 8, 24, generator=generator, dtype=torch.float64)
    queries = keys[:, 0] + torch.randn(30, 24, generator=generator, dtype=torch.float64)
    values = torch.randint(0, 300, (30, 8), generator=generator)
    tensors = [tensor.to(dtype) for tensor in (weight, keys, torch.full((30, 8), 1 / 8), queries)]
    return Problem(tensors[0], None, tensors[1], values, tensors[2], tensors[3]).with_base(64)


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_restricted_holds_where_the_rest_is_below_rounding(alpha: float) -> None:
    rule = AdaptationRule(10, alpha)
    exact = dual.solve(peaked_problem(torch.float64), rule)
    adapted = restricted.solve(peaked_problem(torch.float32), rule, moved_words=300, tolerance=math.inf)
    assert torch.isfinite(adapted).all()
    torch.testing.assert_close(adapted.exp().sum(1), torch.ones(30), atol=1e-4, rtol=0)
    likely = exact > -20
    torch.testing.assert_close(adapted[likely].double(), exact[likely], atol=2e-3, rtol=1e-3)
    few = restricted.solve(peaked_problem(torch.float32), rule, moved_words=8, tolerance=math.inf)
    torch.testing.assert_close(few.exp().sum(1), torch.ones(30), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restricted_on_three_words_that_the_steps_overturn(dtype: torch.dtype) -> None:
    for layer, keys, values, query, alpha in (
        ([-7.0, 9.0, 12.0], [-4.0, -3.0], [1, 2], 4.0, 0.5),
        ([-30.0, -23.0, 20.0], [4.0, -3.0], [0, 2], -4.0, 1.0),
    ):
        problem = Problem(
            torch.tensor(layer, dtype=dtype)[:, None],
            None,
            torch.tensor(keys, dtype=dtype)[None, :, None],
            torch.tensor([values]),
            torch.full((1, 2), 0.5, dtype=dtype),
            torch.tensor([[query]], dtype=dtype),
        ).with_base(64)
        rule = AdaptationRule(10, alpha)
        adapted = restricted.solve(problem, rule, tolerance=math.inf)
        torch.testing.assert_close(adapted, dual.solve(problem, rule), atol=1e-3, rtol=1e-3)


def padded(problem: Problem, empty: int) -> Problem:
    """Give each query so many more places that no entry fills, as a memory does."""
    pad = torch.nn.functional.pad
    return replace(
        problem,
        keys_BKd=pad(problem.keys_BKd, (0, 0, 0, empty)),
        values_BK=pad(problem.values_BK, (0, empty)),
        weights_BK=pad(problem.weights_BK, (0, empty)),
        base=BaseSoftmax(
            problem.base.log_probabilities_BV,
            pad(problem.base.log_partitions_BK, (0, empty)),
            pad(problem.base.likely_words_BKc, (0, 0, 0, empty)),
            pad(problem.base.likely_probabilities_BKc, (0, 0, 0, empty)),
        ),
    )


@pytest.mark.parametrize("solver", EXACT_SOLVERS)
@pytest.mark.parametrize("rule", [AdaptationRule(10, 0.1, 0.2), AdaptationRule(30, 0.03, 0.2, "momentum")])
def test_more_places_than_entries_change_nothing(solver: str, rule: AdaptationRule) -> None:
    problem = random_problem(3, 4, 50, 4, 0, likely=8)
    expected = EXACT_SOLVERS[solver](problem, rule)
    torch.testing.assert_close(EXACT_SOLVERS[solver](padded(problem, 28), rule), expected, atol=1e-12, rtol=0)
    nothing = replace(problem, weights_BK=torch.zeros_like(problem.weights_BK))
    base = base_log_probabilities(problem)
    torch.testing.assert_close(EXACT_SOLVERS[solver](nothing, rule), base, atol=1e-12, rtol=0)
    torch.testing.assert_close(EXACT_SOLVERS[solver](padded(nothing, 28), rule), base, atol=1e-12, rtol=0)


def test_empty_places_change_nothing_where_the_layer_is_extreme() -> None:
    problem = random_problem(3, 2, 50, 4, 0, dtype=torch.float32)
    problem = replace(problem, bias_V=torch.tensor([0.0, 90.0] + [-200.0] * 48)).with_base(8)
    rule = AdaptationRule(10, 20.0)
    for tolerance in (0.1, math.inf):
        expected = restricted.solve(problem, rule, tolerance=tolerance)
        torch.testing.assert_close(
            restricted.solve(padded(problem, 5), rule, tolerance=tolerance), expected, atol=1e-3, rtol=1e-4
        )


@pytest.mark.parametrize("solver", EXACT_SOLVERS)
@pytest.mark.parametrize("rule", [AdaptationRule(10, 0.1, 0.2), AdaptationRule(20, 0.02, 0.2, "momentum")])
def test_copies_of_a_neighbour_are_one_of_their_summed_weight(solver: str, rule: AdaptationRule) -> None:
    problem = random_problem(3, 4, 50, 4, 0)
    copies = replace(
        problem,
        keys_BKd=problem.keys_BKd.repeat_interleave(3, dim=1),
        values_BK=problem.values_BK.repeat_interleave(3, dim=1),
        weights_BK=problem.weights_BK.repeat_interleave(3, dim=1) / 3,
    ).with_base(100)
    torch.testing.assert_close(EXACT_SOLVERS[solver](copies, rule), EXACT_SOLVERS[solver](problem, rule), atol=1e-10, rtol=0)


def test_more_moved_words_come_closer_and_the_first_order_helps() -> None:
    problem, rule = random_problem(20, 8, 2000, 12, 0, likely=60), AdaptationRule(5, 0.1)
    exact = dual.solve(problem, rule)
    errors = [float((restricted.solve(problem, rule, None, moved, math.inf) - exact).abs().mean()) for moved in (0, 20, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3
    nothing_listed = random_problem(20, 8, 2000, 12, 0, likely=1)
    assert float((restricted.solve(nothing_listed, rule, None, 0, math.inf) - exact).abs().mean()) > 3 * errors[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_distributions_sum_to_one_and_the_layer_is_left_alone(solver: str) -> None:
    problem = random_problem(4, 6, 11, 5, 1)
    before = problem.weight_Vd.clone()
    adapted = SOLVERS[solver](problem, AdaptationRule(5, 0.3))
    torch.testing.assert_close(adapted.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(problem.weight_Vd, before)
    assert not adapted.requires_grad
    targets = torch.tensor([3, 0, 10, 3])
    of_targets = SOLVERS[solver](problem, AdaptationRule(5, 0.3), targets)
    torch.testing.assert_close(of_targets, adapted.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rule", [AdaptationRule(0, 0.3), AdaptationRule(3, 0.0), AdaptationRule(0, 0.0, 1.0)])
def test_no_step_is_the_base_model(solver: str, rule: AdaptationRule) -> None:
    problem = random_problem(4, 6, 11, 5, 1)
    torch.testing.assert_close(SOLVERS[solver](problem, rule), base_log_probabilities(problem), atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_raises_the_neighbours_words(solver: str) -> None:
    problem = random_problem(4, 1, 11, 5, 1)
    problem = replace(problem, queries_Bd=problem.keys_BKd[:, 0]).with_base(11)
    adapted = SOLVERS[solver](problem, AdaptationRule(1, 0.1))
    assert (adapted.gather(1, problem.values_BK) > base_log_probabilities(problem).gather(1, problem.values_BK)).all()


@pytest.mark.parametrize(("solver", "optimizer"), [(a, b) for a in ("dual", "restricted") for b in ("rmsprop", "adam")])
def test_an_optimizer_that_a_solver_does_not_offer_is_named(solver: str, optimizer: str) -> None:
    problem, rule = random_problem(1, 2, 3, 2, 0), AdaptationRule(1, 0.1, optimizer=optimizer)
    with pytest.raises(AdaptationError, match=f"the {solver} solver takes sgd, momentum, not '{optimizer}'; .*reference takes"):
        SOLVERS[solver](problem, rule)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_unknown_optimizer_is_named_with_those_that_there_are(solver: str) -> None:
    problem, rule = random_problem(1, 2, 3, 2, 0), AdaptationRule(1, 0.1, optimizer="newton")
    with pytest.raises(AdaptationError, match=r"not 'newton'; .* reference takes sgd, momentum, rmsprop, adam"):
        SOLVERS[solver](problem, rule)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "schedule"), [(3, (1.0, 1.0)), (2, (1.0, 1.0, 1.0)), (0, (1.0,)), (2, ())])
def test_a_schedule_of_another_length_is_named(solver: str, steps: int, schedule: tuple[float, ...]) -> None:
    problem, rule = random_problem(1, 2, 3, 2, 0), AdaptationRule(steps, 0.1, schedule=schedule)
    with pytest.raises(AdaptationError, match=f"the schedule has {len(schedule)} numbers for {steps} steps; give one a step"):
        SOLVERS[solver](problem, rule)
