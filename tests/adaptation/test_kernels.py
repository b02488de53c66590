import math

import pytest
import torch

from mbpa_lm.adaptation.kernels import gaussian, inverse_distance, neighbour_weights

DISTANCES = torch.tensor([[0.0, 3.0, math.inf], [math.inf, math.inf, math.inf]], dtype=torch.float64)


def test_inverse_distance_is_the_paper_s() -> None:
    weights = neighbour_weights(inverse_distance(1.0)(DISTANCES))
    torch.testing.assert_close(weights[0], torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64))  # 1 and 1/4


def test_gaussian() -> None:
    weights = neighbour_weights(gaussian(2.0)(DISTANCES))
    far = math.exp(-3 / 8)
    torch.testing.assert_close(weights[0], torch.tensor([1.0, far, 0.0], dtype=torch.float64) / (1 + far))


@pytest.mark.parametrize("kernel", [inverse_distance(1e-3), gaussian(0.5)])
def test_a_query_with_no_neighbour_has_no_weight(kernel: object) -> None:
    assert neighbour_weights(kernel(DISTANCES))[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kernel", [inverse_distance(1e-3), gaussian(0.5)])
@pytest.mark.parametrize("distance", [0.0, 1e-30, 1e30])
def test_extreme_distances_give_finite_weights(kernel: object, distance: float) -> None:
    weights = neighbour_weights(kernel(torch.tensor([[distance, 2 * distance, math.inf]])))
    assert torch.isfinite(weights).all()
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weights[0, 2]) == 0.0
