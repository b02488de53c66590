"""The paper's method against cases worked by hand."""

import math

import pytest
import torch

from mbpa_lm.adaptation.kernels import inverse_distance, normalized
from mbpa_lm.adaptation.problem import Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from tests.adaptation.problems import (
    SOLVERS,
)


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
