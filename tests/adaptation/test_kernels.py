"""Kernels and the weights that follow, against numbers worked by hand."""

import math
from collections.abc import Callable

import pytest
import torch

from mbpa_lm.adaptation.kernels import (
    Kernel,
    Weighting,
    gaussian,
    inverse_distance,
    normalized,
    stretched_distances,
    unnormalized,
    within_reach,
)

DOUBLE = torch.float64
DISTANCES = torch.tensor([[0.0, 3.0, math.inf], [math.inf, math.inf, math.inf]], dtype=DOUBLE)

KERNELS: dict[str, Callable[[float], Kernel]] = {"inverse distance": inverse_distance, "gaussian": gaussian}
WEIGHTINGS: dict[str, Callable[[Kernel], Weighting]] = {
    "normalized": normalized,
    "within reach": lambda kernel: within_reach(kernel, 1.0),
    "unnormalized": unnormalized,
}


def assert_weights(found: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE))


def test_inverse_distance_is_the_paper_s() -> None:
    assert_weights(normalized(inverse_distance(1.0))(DISTANCES)[0], 0.8, 0.2, 0.0)  # 1 and 1/4


def test_gaussian() -> None:
    far = math.exp(-3 / 8)
    assert_weights(normalized(gaussian(2.0))(DISTANCES)[0], 1 / (1 + far), far / (1 + far), 0.0)


def test_reach_is_one_more_neighbour_that_asks_for_nothing() -> None:
    # Similarities 1 and 1/4, and 1/5 at distance 2: the sum is 29/20.
    assert_weights(within_reach(inverse_distance(1.0), 2.0)(DISTANCES)[0], 20 / 29, 5 / 29, 0.0)
    near, far, at_reach = 1.0, math.exp(-3 / 8), math.exp(-1 / 8)
    total = near + far + at_reach
    assert_weights(within_reach(gaussian(2.0), 1.0)(DISTANCES)[0], near / total, far / total, 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_single_neighbour_at_the_reach_weighs_a_half(kernel: str) -> None:
    at_distance_3 = torch.tensor([[9.0]], dtype=DOUBLE)
    assert_weights(within_reach(KERNELS[kernel](0.7), 3.0)(at_distance_3)[0], 0.5)


def test_unnormalized_weights_are_relative_to_a_neighbour_at_the_query() -> None:
    assert_weights(unnormalized(inverse_distance(0.5))(DISTANCES)[0], 1.0, 1 / 7, 0.0)  # 2 and 2/7, over 2
    assert_weights(unnormalized(gaussian(2.0))(DISTANCES)[0], 1.0, math.exp(-3 / 8), 0.0)
    copies = torch.zeros(1, 5, dtype=DOUBLE)
    assert_weights(unnormalized(gaussian(2.0))(copies)[0], 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_with_no_neighbour_has_no_weight(kernel: str, weighting: str) -> None:
    assert WEIGHTINGS[weighting](KERNELS[kernel](0.5))(DISTANCES)[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_neighbours_pull_one_in_total_only_where_weights_are_normalized(kernel: str) -> None:
    totals = {
        name: [
            float(make(KERNELS[kernel](0.5))(torch.full((1, 32), distance, dtype=DOUBLE)).sum()) for distance in (1.0, 4e3, 1e6)
        ]
        for name, make in WEIGHTINGS.items()
    }
    assert totals["normalized"] == pytest.approx([1.0, 1.0, 1.0])
    for name in ("within reach", "unnormalized"):
        near, farther, farthest = totals[name]
        assert near > 0.9
        assert 0 <= farther < 0.02
        assert 0 <= farthest < 1e-4


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kernel", [inverse_distance(1e-3), gaussian(0.5)])
@pytest.mark.parametrize("distance", [0.0, 1e-30, 1e30, math.inf])
def test_extreme_distances_give_finite_weights(kernel: Kernel, weighting: str, distance: float) -> None:
    weights = WEIGHTINGS[weighting](kernel)(torch.tensor([[distance, 2 * distance, math.inf]]))
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert float(weights[0, 2]) == 0.0
    if distance <= 1e-30 and weighting == "unnormalized":
        assert weights[0, :2].tolist() == [1.0, 1.0]
    if weighting == "normalized":
        assert float(weights.sum()) == pytest.approx(0.0 if distance == math.inf else 1.0)


def gradient(weighting: Callable[[Kernel], Weighting], kernel: str, distances: torch.Tensor) -> float:
    """Return the derivative, with respect to the kernel's parameter, of some weighted sum of the weights."""
    parameter = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    weights = weighting(KERNELS[kernel](parameter))(distances)
    (weights * torch.arange(1, weights.shape[1] + 1)).sum().backward()
    return float(parameter.grad)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_flow_to_the_kernel_s_parameter(kernel: str, weighting: str) -> None:
    distances = torch.tensor([[0.1, 0.4, 2.0], [1.0, 0.0, 0.3]], dtype=DOUBLE)
    parameter = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: WEIGHTINGS[weighting](KERNELS[kernel](value))(distances), parameter)
    assert abs(gradient(WEIGHTINGS[weighting], kernel, distances)) > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_flow_to_the_reach(kernel: str) -> None:
    distances = torch.tensor([[0.1, 0.4, math.inf], [1.0, 0.0, 0.3]], dtype=DOUBLE)
    reach = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: within_reach(KERNELS[kernel](0.7), value)(distances), reach)
    (moved,) = torch.autograd.grad(within_reach(KERNELS[kernel](0.7), reach)(distances).sum(), reach)
    assert float(moved) > 1e-3  # a longer reach, more weight


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    "kernel",
    [
        "inverse distance",
        pytest.param("gaussian"),
    ],
)
def test_an_empty_place_changes_no_gradient(kernel: str, weighting: str) -> None:
    filled = torch.tensor([[0.1, 0.4, 2.0]], dtype=DOUBLE)
    with_empty = torch.nn.functional.pad(filled, (0, 2), value=math.inf)
    expected = gradient(WEIGHTINGS[weighting], kernel, filled)
    assert gradient(WEIGHTINGS[weighting], kernel, with_empty) == pytest.approx(expected, abs=1e-12)


def test_stretched_distances_by_hand_and_their_gradient() -> None:
    keys = torch.tensor([[[1.0, 2.0], [0.0, 5.0]], [[1.0, 1.0], [3.0, 1.0]]], dtype=DOUBLE)
    queries = torch.tensor([[0.0, 4.0], [1.0, 1.0]], dtype=DOUBLE)
    metric = torch.tensor([3.0, 0.5], dtype=DOUBLE, requires_grad=True)
    distances = stretched_distances(keys, queries, metric)
    torch.testing.assert_close(distances, torch.tensor([[5.0, 0.5], [0.0, 12.0]], dtype=DOUBLE))
    distances.sum().backward()
    assert metric.grad.tolist() == [5.0, 5.0]  # the sums of the squared differences
