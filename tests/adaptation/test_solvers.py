"""The paper's method against cases worked by hand, and every solver against the reference."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.kernels import inverse_distance, normalized
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
    weights = normalized(inverse_distance(1.0))((keys - query[:, None]).square().sum(-1))
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


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_steps_with_momentum_and_a_schedule_by_hand(solver: str) -> None:
    # The first step of size 0.6 as above; the second, of size 0.3, goes also half the first gradient (-1/2, -1/3).
    first, second = sigmoid(1.0), sigmoid(-0.2)
    gradient_w, gradient_b = 5 / 6 * (first - 1) - 1 / 6 * second, 5 / 6 * (first - 1) + 1 / 6 * second
    w, b = 0.3 - 0.3 * (gradient_w - 0.5 / 2), 0.2 - 0.3 * (gradient_b - 0.5 / 3)
    rule = AdaptationRule(2, 0.6, optimizer="momentum", momentum=0.5, schedule=(1.0, 0.5))
    assert two_words_two_memories(solver, rule) == pytest.approx(sigmoid(2 * (w + b)), abs=1e-12)


def test_rmsprop_and_adam_by_hand() -> None:
    # The first step of RMSProp divides by sqrt(0.01 g^2), that of Adam, once its means are corrected, by sqrt(g^2): whatever
    # its size each parameter moves 10 alpha, or alpha, against its gradient's sign.
    for optimizer, alpha in (("rmsprop", 0.05), ("adam", 0.5)):
        probability = two_words_two_memories("reference", AdaptationRule(1, alpha, optimizer=optimizer))
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


def without_restriction(problem: Problem, rule: AdaptationRule, targets: torch.Tensor | None = None) -> torch.Tensor:
    """Solve by the restricted solver with every word moved, and never by the dual one in its place."""
    return restricted.solve(problem, rule, targets, moved_words=len(problem.weight_Vd), tolerance=math.inf)


EXACT_SOLVERS = {**SOLVERS, "restricted": without_restriction}


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


def near_problem(V: int, likely: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Neighbours as a memory finds them, near their queries, under a layer whose words are of very different likelihood."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(20, 12, generator=generator, dtype=dtype)
    keys = queries[:, None] + 0.3 * torch.randn(20, 8, 12, generator=generator, dtype=dtype)
    values = torch.randint(0, V, (20, 8), generator=generator)
    layer = 0.7 * torch.randn(V, 12, generator=generator, dtype=dtype), 2 * torch.randn(V, generator=generator, dtype=dtype)
    return Problem(*layer, keys, values, torch.full((20, 8), 1 / 8, dtype=dtype), queries).with_base(likely)


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
