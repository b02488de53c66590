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

from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.errors import AdaptationError

NUMBERS_AT_ONCE = 1 << 24
"""Largest (B, K, V) tensor that is worked on at once; more queries are taken in turns."""


def solve(
    weight_Vd: Tensor,
    bias_V: Tensor | None,
    keys_BKd: Tensor,
    values_BK: Tensor,
    weights_BK: Tensor,
    queries_Bd: Tensor,
    rule: AdaptationRule,
) -> Tensor:
    """Return the adapted log-probabilities (B, V) of each query.

    Raises AdaptationError for a rule whose steps leave the span of the neighbours (any but SGD).
    """
    if rule.optimizer != "sgd":
        raise AdaptationError(f"the dual solver takes sgd only, not {rule.optimizer}; use adaptation.solver reference")
    turn = max(1, NUMBERS_AT_ONCE // (keys_BKd.shape[1] * weight_Vd.shape[0]))
    turns = zip(keys_BKd.split(turn), values_BK.split(turn), weights_BK.split(turn), queries_Bd.split(turn), strict=True)
    return torch.cat([_solve_some(weight_Vd, bias_V, *some, rule) for some in turns])


def _solve_some(
    weight_Vd: Tensor,
    bias_V: Tensor | None,
    keys_BKd: Tensor,
    values_BK: Tensor,
    weights_BK: Tensor,
    queries_Bd: Tensor,
    rule: AdaptationRule,
) -> Tensor:
    one = 1.0 if rule.adapt_bias and bias_V is not None else 0.0
    base_logits_BKV = linear(keys_BKd, weight_Vd, bias_V)
    gram_BKK = keys_BKd @ keys_BKd.mT + one
    pull_BK1 = rule.alpha * weights_BK[..., None]
    moved_BKV: Tensor | None = None  # the vectors a_k, None while they are zero
    for _ in range(rule.steps):
        logits = base_logits_BKV if moved_BKV is None else torch.baddbmm(base_logits_BKV, gram_BKK, moved_BKV)
        gradient_BKV = torch.softmax(logits, dim=-1).mul_(-pull_BK1)
        gradient_BKV.scatter_add_(2, values_BK[..., None], pull_BK1)
        moved_BKV = gradient_BKV if moved_BKV is None else gradient_BKV.add_(moved_BKV, alpha=1 - rule.alpha * rule.beta)
    logits_BV = linear(queries_Bd, weight_Vd, bias_V)
    if moved_BKV is not None:
        towards_BK = (keys_BKd @ queries_Bd[..., None])[..., 0] + one
        logits_BV = logits_BV + (towards_BK[:, None] @ moved_BKV)[:, 0]
    return torch.log_softmax(logits_BV, dim=-1)
