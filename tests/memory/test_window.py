"""The window against a search of the plainest kind, one position after another."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.window import WindowMemory

LIKELY = 2


def make_entries(keys: torch.Tensor, seed: int = 0) -> Entries:
    """Entries with the given keys and whatever else."""
    generator, count = torch.Generator().manual_seed(seed), len(keys)
    return Entries(
        keys,
        torch.randint(0, 9, (count,), generator=generator),
        torch.randn(count, generator=generator, dtype=torch.float64),
        torch.randint(0, 9, (count, LIKELY), generator=generator),
        torch.randn(count, LIKELY, generator=generator, dtype=torch.float64),
    )


def random_entries(count: int, dimension: int = 5, seed: int = 0) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    return make_entries(torch.randn(count, dimension, generator=generator, dtype=torch.float64), seed)


def read_in_chunks(size: int, chunk: int, stream: Entries, K: int) -> Neighbours:
    count = len(stream.keys)
    memory = WindowMemory(size, stream.keys.shape[1], LIKELY, torch.float64, torch.device("cpu"))
    parts = [
        memory.read_and_write(Entries(*(tensor[begin : begin + chunk] for tensor in stream.tensors())), K)
        for begin in range(0, count, chunk)
    ]
    assert len(memory) == min(size, count)
    return Neighbours(
        Entries(*(torch.cat(column) for column in zip(*(part.entries.tensors() for part in parts), strict=True))),
        torch.cat([part.squared_distances for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


def search_plainly(size: int, stream: Entries, K: int) -> Neighbours:
    count = len(stream.keys)
    found = Entries(*(torch.zeros(count, K, *tensor.shape[1:], dtype=tensor.dtype) for tensor in stream.tensors()))
    distances = torch.full((count, K), math.inf, dtype=torch.float64)
    positions = torch.full((count, K), -1)
    for query in range(count):
        visible = range(max(0, query - size), query)
        to_entry = {entry: float((stream.keys[entry] - stream.keys[query]).square().sum()) for entry in visible}
        for place, entry in enumerate(sorted(visible, key=lambda entry: (to_entry[entry], -entry))[:K]):
            for target, source in zip(found.tensors(), stream.tensors(), strict=True):
                target[query, place] = source[entry]
            distances[query, place] = to_entry[entry]
            positions[query, place] = entry
    return Neighbours(found, distances, positions)


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    torch.testing.assert_close(found.positions, expected.positions)
    torch.testing.assert_close(found.squared_distances, expected.squared_distances)
    for one, other in zip(found.entries.tensors(), expected.entries.tensors(), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 100), st.integers(1, 12), st.integers(0, 5))
def test_it_finds_what_a_plain_search_finds(size: int, count: int, chunk: int, K: int, seed: int) -> None:
    stream = random_entries(count, seed=seed)
    assert_same(read_in_chunks(size, chunk, stream, K), search_plainly(size, stream, K))


@pytest.mark.parametrize("chunk", [1, 7, 100, 400])
def test_chunks_longer_than_a_search_and_windows_that_wrap(chunk: int) -> None:
    stream = random_entries(700, dimension=3)
    assert_same(read_in_chunks(150, chunk, stream, 8), search_plainly(150, stream, 8))


@pytest.mark.parametrize("chunk", [1, 5, 60])
def test_among_equal_keys_the_newest_come_first(chunk: int) -> None:
    stream = make_entries(torch.ones(60, 4, dtype=torch.float64))
    found = read_in_chunks(50, chunk, stream, 3)  # many more equal keys than candidates
    for query in (5, 40, 59):
        assert found.positions[query].tolist() == [query - 1, query - 2, query - 3]
    assert (found.squared_distances[5:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_few_contexts_that_recur_all_the_time(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    keys = contexts[torch.randint(0, 3, (300,), generator=generator)]
    stream = make_entries(keys)
    assert_same(read_in_chunks(200, chunk, stream, 5), search_plainly(200, stream, 5))


def test_far_away_keys_keep_exact_distances() -> None:
    keys = torch.tensor([[1e4, 0.0], [1e4 + 1e-3, 0.0], [1e4, 2e-3], [1e4, 0.0]], dtype=torch.float64)
    found = read_in_chunks(10, 4, make_entries(keys), 3)
    assert found.positions[3].tolist() == [0, 1, 2]
    torch.testing.assert_close(
        found.squared_distances[3], torch.tensor([0.0, 1e-6, 4e-6], dtype=torch.float64), rtol=1e-6, atol=0
    )
