"""Random problems for the solvers, and the solvers by name."""

import math

import torch

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.problem import Problem
from mbpa_lm.adaptation.rule import AdaptationRule

SOLVERS = {"reference": reference.solve, "dual": dual.solve, "restricted": restricted.solve}


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


def near_problem(V: int, likely: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Neighbours as a memory finds them, near their queries, under a layer whose words are of very different likelihood."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(20, 12, generator=generator, dtype=dtype)
    keys = queries[:, None] + 0.3 * torch.randn(20, 8, 12, generator=generator, dtype=dtype)
    values = torch.randint(0, V, (20, 8), generator=generator)
    layer = 0.7 * torch.randn(V, 12, generator=generator, dtype=dtype), 2 * torch.randn(V, generator=generator, dtype=dtype)
    return Problem(*layer, keys, values, torch.full((20, 8), 1 / 8, dtype=dtype), queries).with_base(likely)
