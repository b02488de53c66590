"""The window against a search of the plainest kind, one position after another."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.memory.base import Neighbours
from mbpa_lm.memory.window import WindowMemory

FIELDS = ("keys", "values", "log_partitions", "squared_distances", "positions")


def entries(count: int, dimension: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return (
        keys,
        torch.randint(0, 9, (count,), generator=generator),
        torch.randn(count, generator=generator, dtype=torch.float64),
    )


def read_in_chunks(
    size: int, count: int, chunk: int, stream: tuple[torch.Tensor, torch.Tensor, torch.Tensor], K: int
) -> Neighbours:
    memory = WindowMemory(size, stream[0].shape[1], torch.float64, torch.device("cpu"))
    parts = [
        memory.read_and_write(*(tensor[begin : min(begin + chunk, count)] for tensor in stream), K)
        for begin in range(0, count, chunk)
    ]
    assert len(memory) == min(size, count)
    return Neighbours(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))


def search_plainly(size: int, stream: tuple[torch.Tensor, torch.Tensor, torch.Tensor], K: int) -> Neighbours:
    keys, values, log_partitions = stream
    count, dimension = keys.shape
    found = Neighbours(
        torch.zeros(count, K, dimension, dtype=torch.float64),
        torch.zeros(count, K, dtype=torch.int64),
        torch.zeros(count, K, dtype=torch.float64),
        torch.full((count, K), math.inf, dtype=torch.float64),
        torch.full((count, K), -1),
    )
    for query in range(count):
        visible = range(max(0, query - size), query)
        distances = {entry: float((keys[entry] - keys[query]).square().sum()) for entry in visible}
        for place, entry in enumerate(sorted(visible, key=lambda entry: (distances[entry], -entry))[:K]):
            found.keys[query, place] = keys[entry]
            found.values[query, place] = values[entry]
            found.log_partitions[query, place] = log_partitions[entry]
            found.squared_distances[query, place] = distances[entry]
            found.positions[query, place] = entry
    return found


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 100), st.integers(1, 12), st.integers(0, 5))
def test_it_finds_what_a_plain_search_finds(size: int, count: int, chunk: int, K: int, seed: int) -> None:
    stream = entries(count, seed=seed)
    assert_same(read_in_chunks(size, count, chunk, stream, K), search_plainly(size, stream, K))


@pytest.mark.parametrize("chunk", [1, 7, 100, 400])
def test_chunks_longer_than_a_search_and_windows_that_wrap(chunk: int) -> None:
    stream = entries(700, dimension=3)
    assert_same(read_in_chunks(150, 700, chunk, stream, 8), search_plainly(150, stream, 8))


@pytest.mark.parametrize("chunk", [1, 5, 60])
def test_among_equal_keys_the_newest_come_first(chunk: int) -> None:
    keys = torch.ones(60, 4, dtype=torch.float64)
    stream = (keys, torch.arange(60), torch.zeros(60, dtype=torch.float64))
    found = read_in_chunks(50, 60, chunk, stream, 3)  # many more equal keys than candidates
    for query in (5, 40, 59):
        assert found.positions[query].tolist() == [query - 1, query - 2, query - 3]
    assert (found.squared_distances[5:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_few_contexts_that_recur_all_the_time(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    keys = contexts[torch.randint(0, 3, (300,), generator=generator)]
    stream = (keys, torch.arange(300), torch.zeros(300, dtype=torch.float64))
    assert_same(read_in_chunks(200, 300, chunk, stream, 5), search_plainly(200, stream, 5))


def test_far_away_keys_keep_exact_distances() -> None:
    keys = torch.tensor([[1e4, 0.0], [1e4 + 1e-3, 0.0], [1e4, 2e-3], [1e4, 0.0]], dtype=torch.float64)
    found = read_in_chunks(10, 4, 4, (keys, torch.arange(4), torch.zeros(4, dtype=torch.float64)), 3)
    assert found.positions[3].tolist() == [0, 1, 2]
    torch.testing.assert_close(
        found.squared_distances[3], torch.tensor([0.0, 1e-6, 4e-6], dtype=torch.float64), rtol=1e-6, atol=0
    )
