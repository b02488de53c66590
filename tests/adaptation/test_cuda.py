"""The solvers and the search on a CUDA device against the same on the CPU."""

from dataclasses import fields, replace

import pytest
import torch

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.likely_words import likely_words
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.adaptation.slow_weights import GradientScale, SlowRule, SlowWeights
from mbpa_lm.memory.nearest import nearest
from mbpa_lm.memory.nearest_plain import Search
from tests.adaptation.test_solvers import random_problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device on this machine")


def on_cuda(problem: Problem) -> Problem:
    base = problem.base
    assert base is not None
    tensors = {field.name: getattr(problem, field.name) for field in fields(Problem) if field.name != "base"}
    moved = {name: None if tensor is None else tensor.cuda() for name, tensor in tensors.items()}
    names = ("log_probabilities_BV", "log_partitions_BK", "likely_words_BKc", "likely_probabilities_BKc")
    return Problem(**moved, base=BaseSoftmax(*(getattr(base, name).cuda() for name in names)))


@pytest.mark.parametrize("solver", [reference, dual, restricted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solvers_agree_with_the_cpu(solver: object, dtype: torch.dtype) -> None:
    problem, rule = random_problem(6, 8, 300, 16, 0, dtype=dtype, likely=40), AdaptationRule(10, 0.05, 0.1)
    expected = solver.solve(problem, rule)
    found = solver.solve(on_cuda(problem), rule).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4 if dtype == torch.float32 else 1e-9, rtol=0)


def test_half_precision_is_summed_in_single() -> None:
    problem, rule = random_problem(6, 8, 300, 16, 0, dtype=torch.float32, likely=40), AdaptationRule(10, 0.05)
    names = ("weight_Vd", "bias_V", "keys_BKd", "queries_Bd")
    half = replace(problem, base=None, **{name: getattr(problem, name).bfloat16() for name in names}).with_base(40)
    torch.testing.assert_close(restricted.solve(on_cuda(half), rule).cpu(), restricted.solve(half, rule), atol=1e-3, rtol=0)


def test_search_and_likely_words_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(500, 8, generator=generator)
    begins, ends = torch.arange(20), torch.arange(480, 500)
    arguments = (keys, keys.square().sum(1), keys[480:], begins, ends)
    rows, distances = nearest(Search(*(tensor.cuda() for tensor in arguments)), 9)
    expected_rows, expected_distances = nearest(Search(*arguments), 9)
    assert torch.equal(rows.cpu(), expected_rows)
    torch.testing.assert_close(distances.cpu(), expected_distances)
    numbers = torch.randn(4, 100, generator=generator).log_softmax(-1)
    words, _ = likely_words(numbers.cuda(), 7)
    assert torch.equal(words.cpu().sort().values, likely_words(numbers, 7)[0].sort().values)


def test_slow_weights_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(30, 6, generator=generator), torch.randn(30, generator=generator)
    scale = GradientScale(torch.rand(30, 6, generator=generator), torch.rand(30, generator=generator))
    states, targets = torch.randn(4, 6, generator=generator), torch.randint(0, 30, (4,), generator=generator)
    layers = []
    for device in ("cpu", "cuda"):
        slow = SlowWeights(weight.to(device), bias.to(device), SlowRule(4, 0.1, 0.1, 1.0), scale)
        log_probabilities, _ = slow.log_probabilities(states.to(device))
        slow.learn(states.to(device), log_probabilities, targets.to(device))
        layers.append(slow.weight_Vd.cpu())
    torch.testing.assert_close(*layers)
