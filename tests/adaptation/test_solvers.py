"""The paper's method against cases worked by hand, and every solver against the reference."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.kernels import inverse_distance, neighbour_weights
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.errors import AdaptationError

SOLVERS = {"reference": reference.solve, "dual": dual.solve, "restricted": restricted.solve}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def two_words_two_memories(solver: str, rule: AdaptationRule) -> float:
    """Probability of word 0 at q = 1, with W = 0, b = 0 and memories (1, word 0) and (-1, word 1).

    With epsilon 1 the kernel is 1 and 1/5, so the weights are 5/6 and 1/6. Both memories predict 1/2. The gradient of word 0 is
    W: 5/6 (1/2 - 1) 1 + 1/6 (1/2 - 0)(-1) = -1/2;  b: 5/6 (1/2 - 1) + 1/6 (1/2 - 0) = -1/3;  word 1 has the opposite.
    """
    double = {"dtype": torch.float64}
    query, keys = torch.tensor([[1.0]], **double), torch.tensor([[[1.0], [-1.0]]], **double)
    weights = neighbour_weights(inverse_distance(1.0)((keys - query[:, None]).square().sum(-1)))
    torch.testing.assert_close(weights, torch.tensor([[5 / 6, 1 / 6]], **double))
    layer = torch.zeros(2, 1, **double), torch.zeros(2, **double)
    problem = Problem(*layer, keys, torch.tensor([[0, 1]]), weights, query).with_base(2)
    return math.exp(SOLVERS[solver](problem, rule)[0, 0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_by_hand(solver: str) -> None:
    # W = (0.3, -0.3), b = (0.2, -0.2): the logits at q = 1 are 0.5 and -0.5.
    assert two_words_two_memories(solver, AdaptationRule(1, 0.6)) == pytest.approx(sigmoid(1.0), abs=1e-12)
    assert two_words_two_memories(solver, AdaptationRule(1, 0.6, adapt_bias=False)) == pytest.approx(sigmoid(0.6), abs=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_steps_with_a_pull_back_by_hand(solver: str) -> None:
    # After step one word 0 has W = 0.3, b = 0.2 and word 1 the opposite: logits +-0.5 at key 1, -+0.1 at key -1.
    first, second = sigmoid(1.0), sigmoid(-0.2)
    gradient_w = 5 / 6 * (first - 1) - 1 / 6 * second + 0.5 * 0.3
    gradient_b = 5 / 6 * (first - 1) + 1 / 6 * second + 0.5 * 0.2
    w, b = 0.3 - 0.6 * gradient_w, 0.2 - 0.6 * gradient_b
    expected = sigmoid(2 * (w + b))
    assert two_words_two_memories(solver, AdaptationRule(2, 0.6, beta=0.5)) == pytest.approx(expected, abs=1e-12)


def test_rmsprop_by_hand() -> None:
    # The first step divides by sqrt(0.01 g^2): each parameter moves 10 alpha against its gradient's sign, whatever its size.
    probability = two_words_two_memories("reference", AdaptationRule(1, 0.05, optimizer="rmsprop"))
    assert probability == pytest.approx(sigmoid(2.0), abs=1e-6)


def random_problem(
    B: int, K: int, V: int, d: int, seed: int, bias: bool = True, dtype: torch.dtype = torch.float64, likely: int = 100
) -> Problem:
    """A layer, neighbours with duplicate keys and values, some of no weight, and queries."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(B, K, d, generator=generator, dtype=dtype)
    keys[:, K // 2] = keys[:, 0]
    values = torch.randint(0, min(V, 3), (B, K), generator=generator)
    weights = torch.rand(B, K, generator=generator, dtype=dtype)
    weights[:, K - 1 :] = 0 if K > 1 else 1
    weights = weights / weights.sum(1, keepdim=True)
    layer = torch.randn(V, d, generator=generator, dtype=dtype)
    layer_bias = torch.randn(V, generator=generator, dtype=dtype) if bias else None
    queries = torch.randn(B, d, generator=generator, dtype=dtype)
    return Problem(layer, layer_bias, keys, values, weights, queries).with_base(likely)


def base_log_probabilities(problem: Problem) -> torch.Tensor:
    return torch.log_softmax(torch.nn.functional.linear(problem.queries_Bd, problem.weight_Vd, problem.bias_V), -1)


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
    torch.testing.assert_close(restricted.solve(problem, rule, moved_words=V), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", ["dual", "restricted"])
def test_single_precision_and_turns(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, rule = random_problem(7, 8, 40, 16, 0, dtype=torch.float32), AdaptationRule(10, 0.1, 0.1)
    expected = reference.solve(problem, rule)
    torch.testing.assert_close(SOLVERS[solver](problem, rule), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(dual, "NUMBERS_AT_ONCE", 2 * 8 * 40)
    monkeypatch.setattr(restricted, "QUERIES_AT_ONCE", 2)
    torch.testing.assert_close(SOLVERS[solver](problem, rule), expected, atol=1e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 9), st.integers(1, 60), st.integers(1, 6), st.integers(0, 9)),
    *(st.integers(0, 12), st.floats(0.0, 50.0), st.integers(1, 70), st.integers(0, 70)),
)
def test_restricted_distributions_sum_to_one_whatever_is_left_out(
    B: int, K: int, V: int, d: int, seed: int, steps: int, alpha: float, likely: int, moved: int
) -> None:
    problem, rule = random_problem(B, K, V, d, seed, likely=likely), AdaptationRule(steps, alpha)
    adapted = restricted.solve(problem, rule, moved_words=moved)
    assert torch.isfinite(adapted).all()
    torch.testing.assert_close(adapted.exp().sum(-1), torch.ones(B, dtype=torch.float64), atol=1e-9, rtol=0)
    targets = torch.arange(B) % V
    of_targets = restricted.solve(problem, rule, targets, moved_words=moved)
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
    adapted = restricted.solve(peaked_problem(torch.float32), rule, moved_words=300)
    assert torch.isfinite(adapted).all()
    torch.testing.assert_close(adapted.exp().sum(1), torch.ones(30), atol=1e-4, rtol=0)
    likely = exact > -20
    torch.testing.assert_close(adapted[likely].double(), exact[likely], atol=2e-3, rtol=1e-3)
    few = restricted.solve(peaked_problem(torch.float32), rule, moved_words=8)
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
        torch.testing.assert_close(restricted.solve(problem, rule), dual.solve(problem, rule), atol=1e-3, rtol=1e-3)


def test_empty_places_change_nothing() -> None:
    problem = random_problem(3, 2, 50, 4, 0, dtype=torch.float32)
    problem = replace(problem, bias_V=torch.tensor([0.0, 90.0] + [-200.0] * 48)).with_base(8)
    padded = replace(
        problem,
        keys_BKd=torch.nn.functional.pad(problem.keys_BKd, (0, 0, 0, 5)),
        values_BK=torch.nn.functional.pad(problem.values_BK, (0, 5)),
        weights_BK=torch.nn.functional.pad(problem.weights_BK, (0, 5)),
        base=BaseSoftmax(
            problem.base.log_probabilities_BV,
            torch.nn.functional.pad(problem.base.log_partitions_BK, (0, 5)),
            torch.nn.functional.pad(problem.base.likely_words_BKc, (0, 0, 0, 5)),
            torch.nn.functional.pad(problem.base.likely_log_probabilities_BKc, (0, 0, 0, 5)),
        ),
    )
    rule = AdaptationRule(10, 20.0)
    torch.testing.assert_close(restricted.solve(padded, rule), restricted.solve(problem, rule), atol=1e-3, rtol=1e-4)


def test_more_moved_words_come_closer_and_the_first_order_helps() -> None:
    problem, rule = random_problem(20, 8, 2000, 12, 0, likely=60), AdaptationRule(5, 0.1)
    exact = dual.solve(problem, rule)
    errors = [float((restricted.solve(problem, rule, moved_words=moved) - exact).abs().mean()) for moved in (0, 20, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3
    nothing_listed = random_problem(20, 8, 2000, 12, 0, likely=1)
    assert float((restricted.solve(nothing_listed, rule, moved_words=0) - exact).abs().mean()) > 3 * errors[0]


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


def test_an_optimizer_that_a_solver_does_not_offer_is_named() -> None:
    problem, rmsprop = random_problem(1, 2, 3, 2, 0), AdaptationRule(1, 0.1, optimizer="rmsprop")
    with pytest.raises(AdaptationError, match="dual solver takes sgd only, not rmsprop"):
        dual.solve(problem, rmsprop)
    with pytest.raises(AdaptationError, match="restricted solver takes sgd only, not rmsprop"):
        restricted.solve(problem, rmsprop)
    with pytest.raises(AdaptationError, match="'newton' is none of sgd, rmsprop"):
        reference.solve(problem, AdaptationRule(1, 0.1, optimizer="newton"))
