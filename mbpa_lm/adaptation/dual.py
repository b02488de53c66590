"""The same solution as the reference for SGD and momentum, exactly, without a copy of the weights (see steps.py).

Dimensions: `B` queries, `K` neighbours, `V` vocabulary, `d` hidden size.
"""

import torch
from torch import Tensor

from mbpa_lm.adaptation.problem import Problem, pick
from mbpa_lm.adaptation.products import span_products
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.adaptation.steps import SPAN_OPTIMIZERS, shift_at, take_steps

NUMBERS_AT_ONCE = 1 << 24
"""Largest (B, K, V) tensor that is worked on at once; more queries are taken in turns."""


def solve(problem: Problem, rule: AdaptationRule, targets_B: Tensor | None = None) -> Tensor:
    """Return the adapted log-probabilities (B, V) of each query, or those of the targets (B,).

    Tensors in half precision are read as they are; sums and results are float32. Raises AdaptationError for a rule whose
    steps leave the span of the neighbours (RMSProp, Adam).
    """
    rule.require("dual", SPAN_OPTIMIZERS)
    turn = max(1, NUMBERS_AT_ONCE // (problem.values_BK.shape[1] * len(problem.weight_Vd)))
    problem = problem.accumulating()
    return torch.cat([pick(_solve_some(part, rule), targets) for part, targets in problem.turns(turn, targets_B)])


def _solve_some(problem: Problem, rule: AdaptationRule) -> Tensor:
    keys_BKd, queries_Bd, weights_BK, values_BK = problem.keys_BKd, problem.queries_Bd, problem.weights_BK, problem.values_BK
    towards_BK, gram_BKK = span_products(problem, rule.adapt_bias)
    logits_BKV = problem.trained_logits(keys_BKd)
    steps = take_steps(logits_BKV, gram_BKK, weights_BK, values_BK, rule.step_sizes(), rule.beta, rule.velocity_kept)
    logits_BV = problem.trained_logits(queries_Bd)
    return torch.log_softmax(logits_BV + shift_at(towards_BK, weights_BK, values_BK, steps, logits_BV.shape[1]), dim=-1)
