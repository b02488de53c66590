"""The most informative neighbours, against the formula with its inverse taken as it stands."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.adaptation.selection import most_informative

DOUBLE = torch.float64


def uncertainty(states: np.ndarray, query: np.ndarray, chosen: list[int], noise: float) -> float:
    """sigma^2(q | X) = k(q, q) - k(q, X) (K_X + noise I)^-1 k(X, q), of normalized states."""
    observed = states[chosen]
    towards = observed @ query
    return float(query @ query - towards @ np.linalg.inv(observed @ observed.T + noise * np.eye(len(chosen))) @ towards)


def assert_greedy(
    columns: list[int], keys: torch.Tensor, query: torch.Tensor, present: torch.Tensor, noise: float, slack: float
) -> None:
    """Assert that no other candidate would have left less uncertainty, at any step."""
    states = (keys.double() / keys.double().norm(dim=1, keepdim=True)).numpy()
    direction = (query.double() / query.double().norm()).numpy()
    there = [column for column in range(len(keys)) if present[column]]
    assert len(set(columns)) == len(columns)
    for step, column in enumerate(columns):
        before = columns[:step]
        if step >= len(there):
            assert not present[column]
            continue
        left = {one: uncertainty(states, direction, [*before, one], noise) for one in there if one not in before}
        assert column in left
        assert left[column] <= min(left.values()) + slack


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 12), st.integers(1, 7), st.integers(1, 14), st.integers(0, 1000)),
    *(st.sampled_from([0.01, 0.3, 2.0]), st.booleans()),
)
def test_every_choice_lowers_the_uncertainty_most(
    B: int, n: int, d: int, count: int, seed: int, noise: float, copies: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(B, n, d, generator=generator, dtype=DOUBLE)
    if copies:
        keys = keys[:, torch.randint(0, (n + 2) // 3, (n,), generator=generator)]
    queries = torch.randn(B, d, generator=generator, dtype=DOUBLE)
    present = torch.rand(B, n, generator=generator) < 0.7
    columns = most_informative(keys, queries, present, count, noise)
    assert columns.shape == (B, min(count, n))
    for row in range(B):
        assert_greedy(columns[row].tolist(), keys[row], queries[row], present[row], noise, slack=1e-9)


def test_single_precision_chooses_as_well_up_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(4, 30, 20, generator=generator), torch.randn(4, 20, generator=generator)
    present = torch.ones(4, 30, dtype=torch.bool)
    columns = most_informative(keys, queries, present, 10)
    for row in range(4):
        assert_greedy(columns[row].tolist(), keys[row], queries[row], present[row], 0.01, slack=1e-5)


def test_copies_of_one_context_count_once() -> None:
    # Ten copies of the nearest context, and three others that each point, beside their own direction, a little to the query.
    query = torch.zeros(1, 6, dtype=DOUBLE)
    query[0, 0] = 1.0
    nearest, others = torch.zeros(6, dtype=DOUBLE), torch.zeros(3, 6, dtype=DOUBLE)
    nearest[0], nearest[1] = 0.9, 0.4
    for other, share in enumerate((0.8, 0.7, 0.6)):
        others[other, 0], others[other, 2 + other] = share, (1 - share**2) ** 0.5
    keys = torch.cat([nearest.expand(10, 6), others])[None]
    order = torch.tensor([3, 10, 0, 11, 1, 2, 4, 12, 5, 6, 7, 8, 9])  # the others are not at the end
    keys = keys[:, order]
    contexts = ["copy" if old < 10 else f"other {old - 10}" for old in order.tolist()]
    columns = most_informative(keys, query, torch.ones(1, 13, dtype=torch.bool), 6)[0]
    assert [contexts[column] for column in columns.tolist()] == ["copy", "other 0", "other 1", "other 2", "copy", "copy"]
    by_nearness = (keys @ query[0]).argsort(descending=True)[0, :6]
    assert {contexts[column] for column in by_nearness.tolist()} == {"copy"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_that_are_not_there_come_last(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 8, 5, generator=generator, dtype=dtype)
    queries = torch.randn(3, 5, generator=generator, dtype=dtype)
    keys[0, 2] = queries[0]  # would be chosen first
    present = torch.tensor([[True, True, False, False, True, True, False, True], [False] * 8, [True] * 8])
    columns = most_informative(keys, queries, present, 8)
    assert set(columns[0, :5].tolist()) == {0, 1, 4, 5, 7}
    for row in range(3):
        assert sorted(columns[row].tolist()) == list(range(8))


def test_what_is_not_there_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(4, 9, 5, generator=generator), torch.randn(4, 5, generator=generator)
    present = torch.arange(9).expand(4, 9) < 6
    columns = most_informative(keys, queries, present, 5)
    assert torch.equal(most_informative(keys[:, :6], queries, present[:, :6], 5), columns)
    keys[:, 6:] = 0
    assert torch.equal(most_informative(keys, queries, present, 5), columns)


def test_queries_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(20, 4, 33, generator=generator)
    keys = contexts[:, torch.randint(0, 4, (24,), generator=generator)]  # copies: ties at every step
    queries, present = contexts[:, 0] + torch.randn(20, 33, generator=generator), torch.ones(20, 24, dtype=torch.bool)
    together = most_informative(keys, queries, present, 8)
    alone = [most_informative(keys[row : row + 1], queries[row : row + 1], present[row : row + 1], 8) for row in range(20)]
    assert torch.equal(torch.cat(alone), together)
