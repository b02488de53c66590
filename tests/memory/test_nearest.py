"""Both searches for the nearest keys, against each other and against a search of the plainest kind, and once against FAISS."""

import itertools
import math
from collections.abc import Callable

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.memory import nearest as module
from mbpa_lm.memory.nearest import nearest, nearest_compiled
from mbpa_lm.memory.nearest_faiss import nearest_faiss
from mbpa_lm.memory.nearest_plain import Search, nearest_plain

Find = Callable[..., tuple[torch.Tensor, torch.Tensor]]
SEARCHES: dict[str, Find] = {
    "compiled": nearest_compiled,
    "plain": nearest_plain,
    "faiss": lambda search, count, products: nearest_faiss(search, count),  # it makes products of its own
}
DTYPES = [torch.float32, torch.float64]
CASES = [*itertools.product(("compiled", "plain"), DTYPES), ("faiss", torch.float32)]  # FAISS knows single precision alone


def find(
    name: str, keys: torch.Tensor, queries: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return SEARCHES[name](Search(keys, keys.square().sum(1), queries, begins, ends), count, queries @ keys.T)


def whole(keys: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of every key, for each query."""
    return torch.zeros(len(queries), dtype=torch.int64), torch.full((len(queries),), len(keys))


def search_plainly(
    keys: torch.Tensor, queries: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort all that a query sees by distances in double precision, the newest first among equals."""
    rows, distances = torch.full((len(queries), count), -1), torch.full((len(queries), count), math.inf, dtype=torch.float64)
    for query, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        to_row = {row: float((keys[row].double() - queries[query].double()).square().sum()) for row in range(begin, end)}
        for place, row in enumerate(sorted(to_row, key=lambda row: (to_row[row], -row))[:count]):
            rows[query, place], distances[query, place] = row, to_row[row]
    return rows, distances


def random_ranges(queries: int, keys: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges of all sorts, some of them empty."""
    bounds = torch.randint(0, keys + 1, (queries, 2), generator=generator).sort(1).values
    begins, ends = bounds[:, 0].clone(), bounds[:, 1].clone()
    ends[::5] = begins[::5]
    return begins, ends


@pytest.mark.parametrize(("name", "dtype"), CASES)
@settings(max_examples=60, deadline=None)
@given(*(st.integers(1, 70), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.integers(0, 1000)), st.integers(0, 3))
def test_keys_on_a_grid_come_in_the_order_of_a_plain_search(
    name: str, dtype: torch.dtype, N: int, C: int, d: int, count: int, seed: int, size: int
) -> None:
    # On a grid every distance is a small integer: copies and ties everywhere, and no rounding.
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-size, size + 1, (N, d), generator=generator).to(dtype)
    queries = torch.randint(-size, size + 1, (C, d), generator=generator).to(dtype)
    begins, ends = random_ranges(C, N, generator)
    rows, distances = find(name, keys, queries, begins, ends, count)
    expected_rows, expected_distances = search_plainly(keys, queries, begins, ends, count)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(distances, expected_distances.to(dtype))


@pytest.mark.parametrize(("name", "dtype"), CASES)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 9), st.integers(1, 40), st.integers(1, 20), st.integers(0, 1000))
def test_keys_anywhere_come_in_the_order_of_a_plain_search(
    name: str, dtype: torch.dtype, N: int, C: int, d: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(N, d, generator=generator, dtype=dtype)
    queries = torch.randn(C, d, generator=generator, dtype=dtype)
    begins, ends = random_ranges(C, N, generator)
    rows, distances = find(name, keys, queries, begins, ends, count)
    _, expected_distances = search_plainly(keys, queries, begins, ends, count)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(distances.double(), expected_distances, rtol=rounding, atol=0)
    filled = rows >= 0
    assert torch.equal(filled, expected_distances.isfinite())
    measured = (keys[rows.clamp(min=0)].double() - queries[:, None].double()).square().sum(-1)
    torch.testing.assert_close(measured[filled], expected_distances[filled], rtol=rounding, atol=0)
    for query in range(C):
        found = rows[query, filled[query]].tolist()
        assert len(set(found)) == len(found)
        assert all(begins[query] <= row < ends[query] for row in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contexts", [3, 40, 1000])
def test_compiled_and_plain_agree_also_on_contexts_that_recur(contexts: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(contexts, 24, generator=generator, dtype=dtype)[torch.randint(0, contexts, (1000,), generator=generator)]
    queries = keys[torch.randint(0, 1000, (50,), generator=generator)].clone()
    queries[25:] += torch.randn(25, 24, generator=generator, dtype=dtype)
    begins, ends = random_ranges(50, 1000, generator)
    compiled, plain = (find(name, keys, queries, begins, ends, 12) for name in ("compiled", "plain"))
    assert torch.equal(compiled[0], plain[0])
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    if contexts < 1000:
        assert torch.equal(compiled[0], search_plainly(keys, queries, begins, ends, 12)[0])


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_among_more_copies_than_candidates_the_newest_come_first(name: str, dtype: torch.dtype) -> None:
    keys = torch.ones(200, 5, dtype=dtype)
    keys[::7] = 3.0
    queries = torch.ones(3, 5, dtype=dtype) + torch.tensor([[0.0], [0.1], [5.0]], dtype=dtype)
    begins, ends = torch.tensor([20, 0, 50]), torch.tensor([190, 200, 51])
    rows, distances = find(name, keys, queries, begins, ends, 3)
    assert rows.tolist() == [[188, 187, 186], [199, 198, 197], [50, -1, -1]]
    assert distances[0].tolist() == [0.0, 0.0, 0.0]
    assert distances[2, 1:].tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("d", [2, 7, 600])
def test_keys_far_from_the_origin_are_told_apart(name: str, dtype: torch.dtype, d: int) -> None:
    # Squared norms are about 2^24 d, distances at most a few d / 2^12: far below the rounding of a product in single precision.
    generator = torch.Generator().manual_seed(0)
    far = 4096 * torch.randint(0, 2, (d,), generator=generator).mul(2).sub(1).to(dtype)
    keys = far + torch.randint(-3, 4, (400, d), generator=generator) / 2**6
    queries = far + torch.randint(-3, 4, (6, d), generator=generator) / 2**6
    begins, ends = torch.tensor([0, 10, 200, 390, 0, 5]), torch.tensor([400, 300, 210, 400, 0, 399])
    rows, distances = find(name, keys, queries, begins, ends, 8)
    expected_rows, expected_distances = search_plainly(keys, queries, begins, ends, 8)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(distances, expected_distances.to(dtype))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_no_key_is_in_sight(name: str, dtype: torch.dtype) -> None:
    keys, queries = torch.zeros(3, 2, dtype=dtype), torch.zeros(2, 2, dtype=dtype)
    rows, distances = find(name, keys, queries, torch.tensor([1, 3]), torch.tensor([1, 3]), 4)
    assert rows.tolist() == [[-1] * 4] * 2
    assert distances.tolist() == [[math.inf] * 4] * 2


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_what_a_query_does_not_see_changes_nothing_to_the_bit(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for d in (1, 5, 16, 33, 61):
        keys = torch.randn(300, d, generator=generator, dtype=dtype)
        keys[::3] = keys[0]
        queries = keys[100:130] + torch.randn(30, d, generator=generator, dtype=dtype) * (torch.arange(30) % 2)[:, None]
        begins = torch.randint(20, 80, (30,), generator=generator)
        ends = torch.randint(100, 250, (30,), generator=generator)
        rows, distances = find(name, keys, queries, begins, ends, 6)
        others = keys.clone()
        others[:20], others[250:] = 1e3 * others[:20], others[250:] - 1e4
        changed = find(name, others, queries, begins, ends, 6)
        assert torch.equal(changed[0], rows)
        assert torch.equal(changed[1], distances)
        for query in range(0, 30, 7):
            some = slice(query, query + 1)
            alone = find(name, keys, queries[some], begins[some], ends[some], 6)
            assert torch.equal(alone[0], rows[some])
            assert torch.equal(alone[1], distances[some])


@pytest.mark.parametrize("name", SEARCHES)
def test_they_find_what_faiss_finds(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(3000, 40, generator=generator), torch.randn(60, 40, generator=generator)
    index = faiss.IndexFlatL2(40)
    index.add(keys.numpy())
    expected_distances, expected_rows = (torch.from_numpy(array) for array in index.search(queries.numpy(), 10))
    rows, distances = find(name, keys, queries, *whole(keys, queries), 10)
    torch.testing.assert_close(distances, expected_distances, rtol=1e-4, atol=0)
    assert np.mean([len(set(one) & set(other)) for one, other in zip(rows.tolist(), expected_rows.tolist(), strict=True)]) == 10
    assert (rows == expected_rows).float().mean() > 0.99  # but for two that are equally near up to FAISS's rounding


def test_the_compiled_search_is_taken_on_a_cpu_and_the_plain_one_for_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("nearest_compiled", "nearest_plain"):
        monkeypatch.setattr(module, name, lambda *arguments, name=name: (taken.append(name), SEARCHES["plain"](*arguments))[1])
    keys = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        cast = keys.to(dtype)
        rows, _ = nearest(Search(cast, cast.square().sum(1), cast[:5], *whole(keys, keys[:5])), 3)
        assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert taken == ["nearest_compiled", "nearest_compiled", "nearest_plain"]
