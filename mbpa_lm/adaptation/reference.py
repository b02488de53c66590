"""The definition: for each query a copy of the output layer, autograd, and PyTorch's own optimizer.

Slow on purpose (a copy is V x d numbers): everything faster is tested against it.
Dimensions: `B` queries, `K` neighbours, `V` vocabulary, `d` hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from mbpa_lm.adaptation.problem import Problem, pick
from mbpa_lm.adaptation.rule import AdaptationRule

OPTIMIZERS: dict[str, Callable[[list[Tensor], AdaptationRule], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, rule: torch.optim.SGD(parameters, lr=rule.alpha),
    "momentum": lambda parameters, rule: torch.optim.SGD(parameters, lr=rule.alpha, momentum=rule.momentum),
    "rmsprop": lambda parameters, rule: torch.optim.RMSprop(parameters, lr=rule.alpha),
    "adam": lambda parameters, rule: torch.optim.Adam(parameters, lr=rule.alpha),
}


def solve(problem: Problem, rule: AdaptationRule, targets_B: Tensor | None = None) -> Tensor:
    """Return the adapted log-probabilities (B, V) of each query, or those of the targets (B,). The layer is not changed.

    Tensors in half precision are read as they are; sums and results are float32. Raises AdaptationError for an optimizer
    that it does not know.
    """
    rule.require("reference", tuple(OPTIMIZERS))
    problem = problem.accumulating()
    queries = zip(problem.keys_BKd, problem.values_BK, problem.weights_BK, problem.queries_Bd, strict=True)
    return pick(torch.stack([_solve_one(problem, *query, rule) for query in queries]), targets_B)


@torch.enable_grad()
def _solve_one(
    problem: Problem, keys_Kd: Tensor, values_K: Tensor, weights_K: Tensor, query_d: Tensor, rule: AdaptationRule
) -> Tensor:
    weight_Vd, bias_V = problem.weight_Vd, problem.bias_V
    weight = weight_Vd.detach().clone().requires_grad_()
    bias = None if bias_V is None else bias_V.detach().clone()
    trained, adapted = [weight_Vd.detach()], [weight]
    if bias is not None and bias_V is not None and rule.adapt_bias:
        trained.append(bias_V.detach())
        adapted.append(bias.requires_grad_())

    def logits(states: Tensor) -> Tensor:
        if problem.softcap is None:
            return linear(states, weight, bias)
        change = linear(states, weight - weight_Vd, None if bias is None or bias_V is None else bias - bias_V)
        return problem.trained_logits(states) + change

    optimizer = OPTIMIZERS[rule.optimizer](adapted, rule)
    for alpha in rule.step_sizes():
        for group in optimizer.param_groups:
            group["lr"] = alpha
        log_probabilities = torch.log_softmax(logits(keys_Kd), dim=-1)  # (K, V)
        loss = -(weights_K * log_probabilities.gather(1, values_K[:, None])[:, 0]).sum()
        for parameter, origin in zip(adapted, trained, strict=True):
            loss = loss + rule.beta / 2 * (parameter - origin).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.log_softmax(logits(query_d), dim=-1).detach()
