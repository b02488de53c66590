"""Rows of rare words against the rule of Rae et al. 2018, one occurrence after another."""

import pytest
import torch

from mbpa_lm.system.processes import Processes
from mbpa_lm.training.hebbian import HebbianRule

V, D = 6, 4


def rule(limit: int, floor: float = 0.0) -> HebbianRule:
    return HebbianRule(limit, floor, V, Processes("cpu"))


def of_length(vector: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return vector * other.norm() / vector.norm()


def test_a_word_seen_once_is_its_context_and_seen_twice_the_mean_of_two() -> None:
    torch.manual_seed(0)
    weight, hidden_states = torch.randn(V, D), torch.randn(2, D)
    before, one = weight.clone(), rule(limit=10)
    one.move_rows(weight, hidden_states[:1], torch.tensor([3]))
    first = of_length(hidden_states[0], before[3])
    torch.testing.assert_close(weight[3], first)
    one.move_rows(weight, hidden_states[1:], torch.tensor([3]))
    torch.testing.assert_close(weight[3], first / 2 + of_length(hidden_states[1], first) / 2)
    others = [word for word in range(V) if word != 3]
    assert torch.equal(weight[others], before[others])


def test_several_occurrences_in_a_batch_count_together() -> None:
    torch.manual_seed(0)
    weight, hidden_states = torch.randn(V, D), torch.randn(5, D)
    before, one = weight.clone(), rule(limit=10)
    one.seen_V[2] = 1
    one.move_rows(weight, hidden_states, torch.tensor([2, 5, 2, 2, 0]))
    mean = of_length(hidden_states[[0, 2, 3]].mean(0), before[2])
    torch.testing.assert_close(weight[2], 0.75 * mean + 0.25 * before[2])
    assert one.seen_V.tolist() == [1, 0, 4, 0, 0, 1]


@pytest.mark.parametrize(("floor", "share"), [(0.0, 0.1), (0.3, 0.3)])
def test_the_share_falls_to_its_floor_and_common_words_stay(floor: float, share: float) -> None:
    torch.manual_seed(0)
    weight, hidden_states = torch.randn(V, D), torch.randn(2, D)
    before, one = weight.clone(), rule(limit=10, floor=floor)
    one.seen_V[:] = torch.tensor([9, 10, 0, 0, 0, 0])
    one.move_rows(weight, hidden_states, torch.tensor([0, 1]))
    torch.testing.assert_close(weight[0], share * of_length(hidden_states[0], before[0]) + (1 - share) * before[0])
    assert torch.equal(weight[1], before[1])


def test_a_hidden_state_of_zeros_leaves_finite_rows() -> None:
    weight = torch.randn(V, D)
    rule(limit=10).move_rows(weight, torch.zeros(1, D), torch.tensor([3]))
    assert torch.isfinite(weight).all()
