"""The definition: for each query a copy of the output layer, autograd, and PyTorch's own optimizer.

Slow on purpose (a copy is V x d numbers): everything faster is tested against it.
Dimensions: `B` queries, `K` neighbours, `V` vocabulary, `d` hidden size.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from mbpa_lm.adaptation.problem import Problem, pick
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.errors import AdaptationError

OPTIMIZERS = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}


def solve(problem: Problem, rule: AdaptationRule, targets_B: Tensor | None = None) -> Tensor:
    """Return the adapted log-probabilities (B, V) of each query, or those of the targets (B,). The layer is not changed.

    Raises AdaptationError for an optimizer that it does not know.
    """
    if rule.optimizer not in OPTIMIZERS:
        raise AdaptationError(f"adaptation.optimizer {rule.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    queries = zip(problem.keys_BKd, problem.values_BK, problem.weights_BK, problem.queries_Bd, strict=True)
    return pick(torch.stack([_solve_one(problem.weight_Vd, problem.bias_V, *query, rule) for query in queries]), targets_B)


@torch.enable_grad()
def _solve_one(
    weight_Vd: Tensor,
    bias_V: Tensor | None,
    keys_Kd: Tensor,
    values_K: Tensor,
    weights_K: Tensor,
    query_d: Tensor,
    rule: AdaptationRule,
) -> Tensor:
    weight = weight_Vd.detach().clone().requires_grad_()
    bias = None if bias_V is None else bias_V.detach().clone()
    trained, adapted = [weight_Vd.detach()], [weight]
    if bias is not None and bias_V is not None and rule.adapt_bias:
        trained.append(bias_V.detach())
        adapted.append(bias.requires_grad_())
    optimizer = OPTIMIZERS[rule.optimizer](adapted, lr=rule.alpha)
    for _ in range(rule.steps):
        log_probabilities = torch.log_softmax(linear(keys_Kd, weight, bias), dim=-1)  # (K, V)
        loss = -(weights_K * log_probabilities.gather(1, values_K[:, None])[:, 0]).sum()
        for parameter, origin in zip(adapted, trained, strict=True):
            loss = loss + rule.beta / 2 * (parameter - origin).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.log_softmax(linear(query_d, weight, bias), dim=-1).detach()
