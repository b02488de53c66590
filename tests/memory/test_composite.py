"""Several memories as one: what is found is what one memory of all entries would find."""

from pathlib import Path

import pytest
import torch

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.composite import CompositeMemory, JoinedStores
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.memory.window import WindowMemory
from tests.conftest import ListedStore

D, K = 4, 5


def listed(count: int, seed: int) -> ListedStore:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-3, 4, (count, D), generator=generator).double()  # few places, so that distances are equal often
    return ListedStore(keys, torch.randint(0, 9, (count,), generator=generator))


def stream_entries(count: int) -> Entries:
    store = listed(count, 9)
    return store.entries


def window(metric: torch.Tensor | None = None) -> WindowMemory:
    return WindowMemory(30, D, 0, torch.float64, torch.device("cpu"), metric)


def read(memory: CompositeMemory, stream: Entries, chunk: int) -> Neighbours:
    parts = []
    for begin in range(0, len(stream.keys), chunk):
        parts.append(memory.read_and_write(Entries(*(tensor[begin : begin + chunk] for tensor in stream.tensors())), K))
    return Neighbours.joined(parts)


def find_plainly(stores: list[ListedStore], stream: Entries, metric: torch.Tensor) -> list[list[int]]:
    """Positions of the nearest, the last of 30 of the stream and all of the stores, the newest first among equals."""
    known = torch.cat([store.entries.keys for store in stores])
    found = []
    for query in range(len(stream.keys)):
        seen = dict(enumerate(known))
        seen |= {len(known) + place: stream.keys[place] for place in range(max(0, query - 30), query)}
        distance = {place: float(((key - stream.keys[query]).square() * metric).sum()) for place, key in seen.items()}
        found.append(sorted(distance, key=lambda place: (distance[place], -place))[:K])
    return found


@pytest.mark.parametrize("sizes", [[7], [20, 3], [3, 1, 40]])
@pytest.mark.parametrize("chunk", [1, 6, 80])
def test_the_nearest_of_all_memories_are_found(sizes: list[int], chunk: int) -> None:
    stores, stream = [listed(size, number) for number, size in enumerate(sizes)], stream_entries(80)
    memory = CompositeMemory(window(), JoinedStores(stores))
    found = read(memory, stream, chunk)
    assert found.positions.tolist() == find_plainly(stores, stream, torch.ones(D))
    assert len(memory) == sum(sizes) + 30
    everything = torch.cat([*(store.entries.values for store in stores), stream.values])
    assert torch.equal(found.entries.values, everything[found.positions])


def test_a_metric_measures_what_is_in_the_stores_too() -> None:
    metric = torch.tensor([1.0, 0.01, 1.0, 1.0], dtype=torch.float64)
    stores, stream = [listed(12, 0)], stream_entries(40)
    found = read(CompositeMemory(window(metric), JoinedStores(stores), metric), stream, 40)
    assert found.positions.tolist() == find_plainly(stores, stream, metric)


def test_places_are_empty_where_all_memories_together_have_fewer() -> None:
    found = read(CompositeMemory(window(), JoinedStores([listed(2, 0)])), stream_entries(3), 3)
    assert (found.positions >= 0).sum(1).tolist() == [2, 3, 4]
    assert found.squared_distances[0, 2:].isinf().all()


def test_memories_with_other_likely_words_do_not_fit_together() -> None:
    store = listed(3, 0)
    store.likely_words = 4
    with pytest.raises(ValueError, match="different numbers of likely words"):
        CompositeMemory(window(), store)


def test_stores_with_other_likely_words_give_none(tmp_path: Path) -> None:
    stores = []
    for likely_words in (2, 3):
        store = Datastore.create(tmp_path / str(likely_words), Identity("m", "t"), Layout(D, likely_words))
        words = torch.zeros(5, likely_words, dtype=torch.int32)
        store.add(Entries(torch.randn(5, D), torch.arange(5), torch.zeros(5), words, words.float()))
        stores.append(store)
    joined = JoinedStores(stores)
    assert joined.likely_words == 0
    assert joined.search(torch.zeros(1, D), 8).entries.likely_words.shape == (1, 8, 0)
    assert JoinedStores(stores[:1]).search(torch.zeros(1, D), 8).entries.likely_words.shape == (1, 8, 2)


def test_keys_of_several_stores_keep_the_precision_of_each(tmp_path: Path) -> None:
    stores, keys = [], torch.randn(5, D)
    for key_type in ("float32", "bfloat16", "float16"):
        store = Datastore.create(tmp_path / key_type, Identity("m", "t"), Layout(D, 0, key_type))  # type: ignore[arg-type]
        store.add(Entries(keys, torch.arange(5), torch.zeros(5), torch.zeros(5, 0).int(), torch.zeros(5, 0)))
        stores.append(store)
    found = JoinedStores(stores).search(keys[:1], 15)
    exact = found.entries.keys[found.positions < 5]
    assert torch.equal(exact, keys[found.positions[found.positions < 5]])
    assert JoinedStores(stores[1:]).search(keys[:1], 1).entries.keys.dtype == torch.float32
