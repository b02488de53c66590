"""Memories that give up an entry by chance, or the one longest of no use, against a simulation of the plainest kind."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.slots import SlotMemory
from tests.memory.test_window import LIKELY, random_entries

CPU = torch.device("cpu")


def read(memory: SlotMemory, stream: Entries, chunk: int, count: int) -> Neighbours:
    return Neighbours.joined(
        [memory.read_and_write(stream.rows(slice(begin, begin + chunk)), count) for begin in range(0, len(stream.keys), chunk)]
    )


def least_retrieved_plainly(size: int, stream: Entries, count: int, metric: torch.Tensor) -> list[list[int]]:
    """Positions found: a list of the entries held, in the order in which they were last of use."""
    held: list[int] = []
    found = []
    for query in range(len(stream.keys)):
        distance = {entry: float((metric * (stream.keys[entry] - stream.keys[query]).square()).sum()) for entry in held}
        nearest = sorted(held, key=lambda entry: (distance[entry], -entry))[:count]
        found.append(nearest + [-1] * (count - len(nearest)))
        held = [entry for entry in held if entry not in nearest] + nearest[::-1]
        held = [*held[-(size - 1) :], query] if size > 1 else [query]
    return found


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 90), st.sampled_from([1, 7, 100]), st.integers(1, 8), st.integers(0, 5), st.booleans()
)
def test_what_is_longest_of_no_use_is_given_up(
    size: int, length: int, chunk: int, count: int, seed: int, stretched: bool
) -> None:
    stream = random_entries(length, seed=seed)
    metric = torch.tensor([0.2, 1.0, 3.0, 0.01, 10.0], dtype=torch.float64) if stretched else None
    memory = SlotMemory(size, 5, LIKELY, torch.float64, CPU, "least_retrieved", metric)
    found = read(memory, stream, chunk, count)
    plain = least_retrieved_plainly(size, stream, count, torch.ones(5) if metric is None else metric)
    assert found.positions.tolist() == plain
    assert len(memory) == min(size, length)
    for query, positions in enumerate(plain):
        for place, entry in enumerate(positions):
            if entry < 0:
                assert found.squared_distances[query, place] == math.inf
            for one, other in zip(found.entries.tensors(), stream.tensors(), strict=True):
                expected = other[entry] if entry >= 0 else torch.zeros_like(other[0])
                assert torch.equal(one[query, place], expected)


@pytest.mark.parametrize("given_up", ["reservoir", "least_retrieved"])
def test_chunks_of_any_length_find_the_same_to_the_bit(given_up: str) -> None:
    stream = random_entries(700)
    found = [
        read(SlotMemory(50, 5, LIKELY, torch.float32, CPU, given_up), stream, chunk, 6)  # type: ignore[arg-type]
        for chunk in (1, 9, 700)
    ]
    for other in found[1:]:
        assert torch.equal(other.positions, found[0].positions)
        assert torch.equal(other.squared_distances, found[0].squared_distances)


def test_a_reservoir_keeps_every_entry_with_the_same_probability() -> None:
    size, length, trials = 10, 60, 400
    kept: Counter[int] = Counter()
    for seed in range(trials):
        memory = SlotMemory(size, 5, LIKELY, torch.float64, CPU, "reservoir", seed=seed)
        stream = random_entries(length)
        read(memory, stream, length, 1)
        kept.update(_held(memory, stream))
    expected = trials * size / length  # 66.7, with a standard deviation of 7.5
    assert sum(kept.values()) == trials * size
    assert all(abs(kept[entry] - expected) < 5 * 7.5 for entry in range(length))
    thirds = [sum(kept[entry] for entry in range(begin, begin + 20)) for begin in (0, 20, 40)]
    assert max(thirds) - min(thirds) < 5 * 40


def _held(memory: SlotMemory, stream: Entries) -> list[int]:
    """The numbers of the entries that a memory holds, by their keys."""
    numbers = {tuple(key.tolist()): number for number, key in enumerate(stream.keys)}
    everything = memory.read_and_write(stream.rows(slice(0, 1)), len(memory))
    return [numbers[tuple(key.tolist())] for key in everything.entries.keys[0]]


def test_a_reservoir_holds_what_chance_chose_before_each_query() -> None:
    stream = random_entries(200)
    memory = SlotMemory(8, 5, LIKELY, torch.float64, CPU, "reservoir", seed=3)
    found = read(memory, stream, 50, 8)
    held: list[int] = []
    for query in range(200):
        entries = found.entries.keys[query][found.positions[query] >= 0]
        seen = {next(n for n in range(query) if torch.equal(stream.keys[n], key)) for key in entries}
        assert len(seen) == min(query, 8)
        assert seen <= {*held, query - 1}  # one at most is new
        held = list(seen)


def test_products_of_others_are_of_no_use() -> None:
    assert not SlotMemory(8, 5, LIKELY, torch.float64, CPU, "reservoir").takes_products(8)
