"""The window against a search of the plainest kind, one position after another."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.history import StreamHistory
from mbpa_lm.memory.window import WindowMemory

LIKELY = 2


def make_entries(keys: torch.Tensor, seed: int = 0) -> Entries:
    """Entries with the given keys and whatever else."""
    generator, count = torch.Generator().manual_seed(seed), len(keys)
    return Entries(
        keys,
        torch.randint(0, 9, (count,), generator=generator),
        torch.randn(count, generator=generator, dtype=torch.float64),
        torch.randint(0, 9, (count, LIKELY), generator=generator, dtype=torch.int32),
        torch.rand(count, LIKELY, generator=generator, dtype=torch.float64),
    )


def random_entries(count: int, dimension: int = 5, seed: int = 0) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    return make_entries(torch.randn(count, dimension, generator=generator, dtype=torch.float64), seed)


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_only_what_is_to_be_stored_is(chunk: int) -> None:
    stream, chosen = random_entries(300), torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.5
    memory = WindowMemory(40, 5, LIKELY, torch.float64, torch.device("cpu"))
    stored = chosen.nonzero()[:, 0]
    parts = []
    for begin in range(0, 300, chunk):
        piece = slice(begin, begin + chunk)
        parts.append(memory.read_and_write(stream.rows(piece), 6, stored=chosen[piece]))
    found = Neighbours.joined(parts)
    for query in range(300):
        seen = stored[stored < query][-40:]
        distances = (stream.keys[seen] - stream.keys[query]).square().sum(1)
        nearest = distances.argsort()[:6]
        assert torch.equal(found.entries.values[query, : len(nearest)], stream.values[seen[nearest]])
        torch.testing.assert_close(found.squared_distances[query, : len(nearest)], distances[nearest])


def read_in_chunks(
    size: int, chunk: int, stream: Entries, K: int, metric: torch.Tensor | None = None, one_retrieval: bool = False
) -> Neighbours:
    count, dtype = len(stream.keys), stream.keys.dtype
    memory = WindowMemory(size, stream.keys.shape[1], LIKELY, dtype, torch.device("cpu"), metric)
    history = StreamHistory(size, stream.keys.shape[1], dtype, torch.device("cpu")) if one_retrieval else None
    parts = []
    for begin in range(0, count, chunk):
        piece = Entries(*(tensor[begin : begin + chunk] for tensor in stream.tensors()))
        products = None if history is None else history.read_and_write(piece.keys, piece.values).products
        parts.append(memory.read_and_write(piece, K, products))
    assert len(memory) == min(size, count)
    return Neighbours.joined(parts)


def search_plainly(size: int, stream: Entries, K: int, metric: torch.Tensor | None = None) -> Neighbours:
    count = len(stream.keys)
    metric = torch.ones(stream.keys.shape[1], dtype=torch.float64) if metric is None else metric
    found = Entries(*(torch.zeros(count, K, *tensor.shape[1:], dtype=tensor.dtype) for tensor in stream.tensors()))
    distances = torch.full((count, K), math.inf, dtype=torch.float64)
    positions = torch.full((count, K), -1)
    for query in range(count):
        visible = range(max(0, query - size), query)
        to_entry = {entry: float((metric * (stream.keys[entry] - stream.keys[query]).square()).sum()) for entry in visible}
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


@pytest.mark.parametrize("chunk", [1, 7, 100, 400])
def test_products_that_caches_have_made_are_as_good(chunk: int) -> None:
    stream = random_entries(700, dimension=3)
    found = read_in_chunks(150, chunk, stream, 8, one_retrieval=True)
    assert_same(found, search_plainly(150, stream, 8))


def test_products_are_taken_where_they_are_what_a_search_needs() -> None:
    make = partial(WindowMemory, 150, 3, LIKELY, torch.float32, torch.device("cpu"))
    assert make().takes_products(150)
    assert not make().takes_products(500)
    assert not make(torch.ones(3)).takes_products(150)


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


@pytest.mark.parametrize("metric", [None, torch.tensor([0.2, 1.0, 3.0, 0.01, 10.0] * 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_of_any_length_find_the_same_to_the_bit(dtype: torch.dtype, metric: torch.Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = 30 + torch.randn(30, 20, generator=generator, dtype=dtype)[torch.randint(0, 30, (400,), generator=generator)]
    keys[::2] += torch.randn(200, 20, generator=generator, dtype=dtype)  # half of the keys are copies of one another
    one_by_one = read_in_chunks(60, 1, make_entries(keys), 8, metric)
    for chunk in (7, 100, 400):
        found = read_in_chunks(60, chunk, make_entries(keys), 8, metric)
        assert torch.equal(found.positions, one_by_one.positions)
        assert torch.equal(found.squared_distances, one_by_one.squared_distances)
        for one, other in zip(found.entries.tensors(), one_by_one.entries.tensors(), strict=True):
            assert torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 100), st.integers(1, 12), st.integers(0, 5))
def test_a_metric_stretches_distances_and_not_the_keys(size: int, count: int, chunk: int, K: int, seed: int) -> None:
    metric = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 + 0.01
    stream = random_entries(count, seed=seed)
    assert_same(read_in_chunks(size, chunk, stream, K, metric), search_plainly(size, stream, K, metric))


def test_a_metric_through_windows_that_wrap() -> None:
    metric = torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64)
    stream = random_entries(1500, dimension=3)
    found = read_in_chunks(150, 100, stream, 4, metric)
    assert_same(found, search_plainly(150, stream, 4, metric))
    assert not torch.equal(found.positions, read_in_chunks(150, 100, stream, 4).positions)


def test_a_metric_by_hand() -> None:
    # From (0, 0) to (1, 0) it is 9, to (0, 2) it is 1: the metric turns round which one is near.
    keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    found = read_in_chunks(10, 3, make_entries(keys), 2, torch.tensor([9.0, 0.25], dtype=torch.float64))
    assert found.positions[2].tolist() == [1, 0]
    assert found.squared_distances[2].tolist() == [1.0, 9.0]
    assert found.entries.keys[2].tolist() == [[0.0, 2.0], [1.0, 0.0]]


def test_a_window_in_half_precision_keeps_partitions_in_single_precision() -> None:
    stream = random_entries(30)
    memory = WindowMemory(20, 5, LIKELY, torch.bfloat16, torch.device("cpu"))
    found = memory.read_and_write(stream, 3)
    assert found.entries.keys.dtype == found.entries.likely_probabilities.dtype == torch.bfloat16
    assert found.entries.log_partitions.dtype == torch.float32
    assert found.entries.likely_words.dtype == torch.int32
    newest = found.positions[29, 0]
    assert float(found.entries.log_partitions[29, 0]) == pytest.approx(float(stream.log_partitions[newest]), rel=1e-6)


def assert_columns(found: Neighbours, of: Neighbours, columns: list[list[int]]) -> None:
    """Assert that `found` holds the given columns of each row."""
    for row, chosen in enumerate(columns):
        for place, column in enumerate(chosen):
            assert found.positions[row, place] == of.positions[row, column]
            assert found.squared_distances[row, place] == of.squared_distances[row, column]
            for one, other in zip(found.entries.tensors(), of.entries.tensors(), strict=True):
                assert torch.equal(one[row, place], other[row, column])


def test_the_first_neighbours_are_those_of_a_search_for_fewer() -> None:
    stream = random_entries(30)
    found = read_in_chunks(20, 10, stream, 9)
    assert_same(found.first(4), read_in_chunks(20, 10, stream, 4))
    assert found.first(9) is found
    assert found.first(100) is found


def test_neighbours_in_given_columns() -> None:
    found = read_in_chunks(20, 10, random_entries(30), 9)
    columns = [[(row + step) % 9 for step in (3, 0, 5, 3)] for row in range(30)]
    chosen = found.at(torch.tensor(columns))
    assert chosen.positions.shape == (30, 4)
    assert_columns(chosen, found, columns)


def test_neighbours_of_some_positions() -> None:
    found = read_in_chunks(20, 10, random_entries(30), 5)
    some = found.of(slice(4, 9))
    assert len(some.positions) == 5
    assert_columns(
        some,
        Neighbours(
            Entries(*(tensor[4:9] for tensor in found.entries.tensors())), found.squared_distances[4:9], found.positions[4:9]
        ),
        [list(range(5))] * 5,
    )
