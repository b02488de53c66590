"""The same solution as the reference for SGD, exactly, without a copy of the weights.

The gradient with respect to W is sum_k (p_k - onehot(v_k)) w_k h_k^T, so every iterate of SGD from the trained layer is
W + sum_k a_k h_k^T, b + sum_k a_k with one vector a_k of V numbers a neighbour. With G[j,k] = h_j . h_k + 1 (the 1 is
the bias) and L0[k] = W h_k + b, the steps and the query's logits are

    A <- (1 - alpha beta) A + alpha diag(w) (Y - softmax(L0 + G A))
    W q + b + g A,     g[k] = h_k . q + 1

Dimensions: `B` queries, `K` neighbours, `V` vocabulary, `d` hidden size.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from mbpa_lm.adaptation.problem import Problem, pick
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.errors import AdaptationError

NUMBERS_AT_ONCE = 1 << 24
"""Largest (B, K, V) tensor that is worked on at once; more queries are taken in turns."""


def solve(problem: Problem, rule: AdaptationRule, targets_B: Tensor | None = None) -> Tensor:
    """Return the adapted log-probabilities (B, V) of each query, or those of the targets (B,).

    Raises AdaptationError for a rule whose steps leave the span of the neighbours (any but SGD).
    """
    if rule.optimizer != "sgd":
        raise AdaptationError(f"the dual solver takes sgd only, not {rule.optimizer}; use adaptation.solver reference")
    turn = max(1, NUMBERS_AT_ONCE // (problem.values_BK.shape[1] * len(problem.weight_Vd)))
    return torch.cat([pick(_solve_some(part, rule), targets) for part, targets in problem.turns(turn, targets_B)])


def _solve_some(problem: Problem, rule: AdaptationRule) -> Tensor:
    keys_BKd, queries_Bd = problem.keys_BKd, problem.queries_Bd
    one = problem.bias_as_input if rule.adapt_bias else 0.0
    base_logits_BKV = linear(keys_BKd, problem.weight_Vd, problem.bias_V)
    gram_BKK = keys_BKd @ keys_BKd.mT + one
    pull_BK1 = rule.alpha * problem.weights_BK[..., None]
    moved_BKV: Tensor | None = None  # the vectors a_k, None while they are zero
    for _ in range(rule.steps):
        logits = base_logits_BKV if moved_BKV is None else torch.baddbmm(base_logits_BKV, gram_BKK, moved_BKV)
        gradient_BKV = torch.softmax(logits, dim=-1).mul_(-pull_BK1)
        gradient_BKV.scatter_add_(2, problem.values_BK[..., None], pull_BK1)
        moved_BKV = gradient_BKV if moved_BKV is None else gradient_BKV.add_(moved_BKV, alpha=1 - rule.alpha * rule.beta)
    logits_BV = linear(queries_Bd, problem.weight_Vd, problem.bias_V)
    if moved_BKV is not None:
        towards_BK = (keys_BKd @ queries_Bd[..., None])[..., 0] + one
        logits_BV = logits_BV + (towards_BK[:, None] @ moved_BKV)[:, 0]
    return torch.log_softmax(logits_BV, dim=-1)
