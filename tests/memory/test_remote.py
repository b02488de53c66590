"""The memory on Milvus, in Milvus Lite for real: what it finds, of a stream too."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mbpa_lm.memory.base import Entries, Neighbours, SearchesAhead
from mbpa_lm.memory.composite import CompositeMemory, JoinedStores
from mbpa_lm.memory.datastore.manifest import Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.memory.remote.collection import Collection
from mbpa_lm.memory.remote.memory import RemoteMemory
from mbpa_lm.memory.remote.rows import from_rows, output_fields, to_rows
from mbpa_lm.memory.window import WindowMemory
from tests.conftest import ListedStore
from tests.memory.milvus import (
    IDENTITY,
    LAYOUT,
    LIKELY,
    NAME,
    D,
    K,
    LiteServer,
    assert_same,
    opened,
    pymilvus,
    queries,
    some_entries,
)

# What is found


@pytest.mark.parametrize("key_type", ["float16", "bfloat16", "float32"])
def test_it_finds_what_the_datastore_finds(tmp_path: Path, key_type: str) -> None:
    layout, entries = Layout(D, LIKELY, key_type), some_entries(330)  # type: ignore[arg-type]
    off_the_grid = torch.rand(165, D, generator=torch.Generator().manual_seed(1))
    entries.keys[::2] += off_the_grid
    exact = Datastore.create(tmp_path / "exact", IDENTITY, layout)
    with opened(tmp_path, layout, batch=60) as store:
        assert_same(store.search(queries(2), 3), exact.search(queries(2), 3))
        exact.add(entries)
        for first, last in ((0, 3), (3, 40), (40, 41), (41, 330)):  # lengths other than the batches'
            store.add(entries.rows(slice(first, last)))
        assert (len(store), store.likely_words) == (330, LIKELY)
        for _ in range(2):
            for count in (7, 400):
                assert_same(store.search(queries(), count), exact.search(queries(), count))
            store.flush()


@pytest.mark.parametrize("copies", [12, 700])
def test_among_equal_keys_the_newest_come_first(tmp_path: Path, copies: int) -> None:
    with opened(tmp_path, batch=400) as store:
        store.add(replace(some_entries(copies), keys=torch.ones(copies, D)))  # many more than the spare candidates
        for _ in range(2):
            newest = list(range(copies - 1, copies - 1 - K, -1))
            assert store.search(torch.zeros(3, D), K).positions.tolist() == [newest] * 3
            store.flush()


def test_it_can_stand_beside_other_stores(tmp_path: Path) -> None:
    entries, listed = some_entries(60), ListedStore(some_entries(40, seed=1).keys, torch.arange(40), LIKELY)
    with opened(tmp_path, Layout(D, LIKELY, "float32")) as store:
        store.add(entries)
        memory = CompositeMemory(WindowMemory(30, D, LIKELY, torch.float32, torch.device("cpu")), JoinedStores([listed, store]))
        found = memory.read_and_write(some_entries(50, seed=2), K)
    everything = torch.cat([listed.entries.keys, entries.keys, some_entries(50, seed=2).keys])
    for query in range(50):
        seen = [*range(100), *range(100 + max(0, query - 30), 100 + query)]
        distances = (everything - everything[100 + query]).square().sum(1).tolist()
        assert found.positions[query].tolist() == sorted(seen, key=lambda place: (distances[place], -place))[:K]


@pytest.mark.parametrize("index", ["HNSW", "AUTOINDEX"])
def test_a_server_may_search_approximately(tmp_path: Path, server: LiteServer, index: str) -> None:
    entries = replace(some_entries(400), keys=torch.randn(400, D, generator=torch.Generator().manual_seed(1)))
    exact = Datastore.create(tmp_path / "exact", IDENTITY, LAYOUT)
    exact.add(entries)
    with opened(tmp_path, address=server.address, index=index, batch=400) as store:
        store.add(entries)
        store.flush()
        assert server.client().describe_index(NAME, "key")["index_type"] == index
        found, nearest = store.search(queries(), K).positions, exact.search(queries(), K).positions
    pairs = zip(found.tolist(), nearest.tolist(), strict=True)
    assert sum(len(set(one) & set(other)) for one, other in pairs) >= 0.9 * nearest.numel()


def test_a_layout_without_likely_words_gives_none(tmp_path: Path) -> None:
    with opened(tmp_path, Layout(D)) as store:
        store.add(some_entries(20))
        for _ in range(2):
            assert store.search(queries(2), 3).entries.likely_words.shape == (2, 3, 0)
            store.flush()


def test_entries_with_other_likely_words_do_not_fit(tmp_path: Path) -> None:
    with opened(tmp_path, Layout(D, 2)) as store, pytest.raises(ValueError, match="3 likely words, 2 are stored"):
        store.add(some_entries(2))


def test_keys_in_sixteen_bits_survive_the_way_through_a_server() -> None:
    entries = some_entries(4)
    rows = to_rows(10, entries, torch.zeros(4, dtype=torch.int64), half=True)
    sent = pymilvus.grpc_gen.schema_pb2.SearchResultData(
        num_queries=1, top_k=4, topks=[4], scores=[0.0] * 4, primary_field_name="position", output_fields=["key"]
    )
    sent.ids.int_id.data.extend(row["position"] for row in rows)
    keys = sent.fields_data.add(field_name="key", type=pymilvus.DataType.FLOAT16_VECTOR)
    keys.vectors.dim, keys.vectors.float16_vector = D, b"".join(row["key"].tobytes() for row in rows)
    hits = pymilvus.client.search_result.SearchResult(sent)[0]
    assert [hit["position"] for hit in hits] == [10, 11, 12, 13]
    received = [{**row, "key": hit["entity"]["key"]} for row, hit in zip(rows, hits, strict=True)]
    assert set(output_fields(LAYOUT)) <= set(received[0])
    for one, other in zip(from_rows(received, LAYOUT).tensors(), entries.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, check_dtype=False)


# What is on its way


class SlowWrites:
    """Writes that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, write = threading.Event(), Collection.write

        def wait_and_write(*arguments: Any) -> None:
            assert self.go.wait(timeout=20)
            write(*arguments)

        monkeypatch.setattr(Collection, "write", wait_and_write)


def test_what_waits_to_be_written_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, slow = some_entries(70), SlowWrites(monkeypatch)
    exact = Datastore.create(tmp_path / "exact", IDENTITY, LAYOUT)
    with opened(tmp_path, queued=4) as store:
        for first in range(0, 70, 7):
            store.add(entries.rows(slice(first, first + 7)))
            exact.add(entries.rows(slice(first, first + 7)))
            assert_same(store.search(queries(), K), exact.search(queries(), K))
        slow.go.set()
        for _ in range(5):  # while batches arrive
            assert_same(store.search(queries(), K), exact.search(queries(), K))


def test_adding_waits_where_too_many_batches_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowWrites(monkeypatch)
    with opened(tmp_path, queued=2) as store, ThreadPoolExecutor(1) as other:
        store.add(some_entries(40))
        adding = other.submit(store.add, some_entries(8))
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.2)
        slow.go.set()
        adding.result(timeout=20)
        store.flush()
        assert len(store) == 48


# The stream's own memory


def read(memory: RemoteMemory | WindowMemory, stream: Entries, chunk: int, begin: bool = False) -> Neighbours:
    parts = []
    for first in range(0, len(stream.keys), chunk):
        piece = stream.rows(slice(first, first + chunk))
        if begin:
            assert isinstance(memory, RemoteMemory)
            memory.begin(piece.keys, K)
        parts.append(memory.read_and_write(piece, K))
    return Neighbours.joined(parts)


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 80])
def test_a_stream_finds_what_a_window_that_loses_nothing_finds(tmp_path: Path, chunk: int, begin: bool) -> None:
    stream, window = some_entries(80), WindowMemory(200, D, LIKELY, torch.float32, torch.device("cpu"))
    with opened(tmp_path, Layout(D, LIKELY, "float32")) as store:
        memory = RemoteMemory(store)
        assert isinstance(memory, SearchesAhead)
        assert not memory.takes_products(200)
        assert_same(read(memory, stream, chunk, begin), read(window, stream, 80))
        assert len(memory) == len(store) == 80
        assert_same(read(memory, some_entries(9, seed=1), 9, begin), read(window, some_entries(9, seed=1), 9))


def test_chunks_of_any_length_find_the_same_to_the_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = 30 + torch.randn(20, 24, generator=generator)[torch.randint(0, 20, (300,), generator=generator)]
    keys[::2] += torch.randn(150, 24, generator=generator)  # half of the keys are copies of one another
    stream, found = replace(some_entries(300), keys=keys), []
    for chunk, batch in ((25, 25), (30, 100), (300, 300)):  # most are found on the server, on their way, in their own chunk
        with opened(tmp_path / str(chunk), Layout(24, LIKELY), batch=batch) as store:
            found.append(read(RemoteMemory(store), stream, chunk, begin=chunk < 300))
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])


@pytest.mark.parametrize("chunk", [7, 60])
def test_positions_that_are_not_to_be_stored_are_not(tmp_path: Path, chunk: int) -> None:
    stream, stored = some_entries(60), torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.5
    window, parts = WindowMemory(200, D, LIKELY, torch.float32, torch.device("cpu"), surprise=2.0), []
    with opened(tmp_path, Layout(D, LIKELY, "float32")) as store, RemoteMemory(store, surprise=2.0) as memory:
        assert memory.surprise == 2.0
        for first in range(0, 60, chunk):
            rows = slice(first, first + chunk)
            parts.append(memory.read_and_write(stream.rows(rows), K, stored=stored[rows]))
        assert len(store) == int(stored.sum())
    assert_same(Neighbours.joined(parts), window.read_and_write(stream, K, stored=stored))


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("chunk", [7, 60])
def test_a_metric_chooses_among_the_nearest(tmp_path: Path, chunk: int, begin: bool) -> None:
    stream, metric = some_entries(60), torch.tensor([0.0, 1.0, 0.01, 4.0])
    with opened(tmp_path, Layout(D, LIKELY, "float32")) as store, RemoteMemory(store, metric=metric) as memory:
        found = read(memory, stream, chunk, begin)
    for query in range(60):
        squares = (stream.keys[:query] - stream.keys[query]).square()
        distances, measured = squares.sum(1).tolist(), (squares @ metric).tolist()
        near = sorted(range(query), key=lambda place: (distances[place], -place))[: 4 * K]
        wanted = sorted(near, key=lambda place: (measured[place], -place))[:K]
        assert found.positions[query, : len(wanted)].tolist() == wanted
        assert found.squared_distances[query, : len(wanted)].tolist() == pytest.approx([measured[place] for place in wanted])
        assert found.squared_distances[query, len(wanted) :].isinf().all()


def test_a_search_that_was_begun_is_not_taken_for_another(tmp_path: Path) -> None:
    stream, window = some_entries(60), WindowMemory(200, D, LIKELY, torch.float32, torch.device("cpu"))
    with opened(tmp_path, Layout(D, LIKELY, "float32")) as store:
        memory = RemoteMemory(store)
        for first in range(0, 60, 10):
            piece, later = stream.rows(slice(first, first + 10)), stream.rows(slice(first + 10, first + 20))
            memory.begin((later if first % 20 else piece).keys, K if first % 30 else K + 1)
            assert_same(memory.read_and_write(piece, K), window.read_and_write(piece, K))
        memory.begin(queries(), K)
        store.add(replace(some_entries(20), keys=queries()))
        found = memory.read_and_write(replace(some_entries(20), keys=queries()), K)
        assert (found.squared_distances[:, 0] == 0).all()


def test_the_model_can_go_on_while_a_search_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, search = threading.Event(), Collection.search
    monkeypatch.setattr(Collection, "search", lambda *arguments: go.wait(timeout=20) and search(*arguments))
    with opened(tmp_path) as store:
        store.add(some_entries(16))
        store.flush()
        memory = RemoteMemory(store)
        memory.begin(queries(), K)  # would wait for ever
        go.set()
        found = memory.read_and_write(replace(some_entries(20), keys=queries()), K)
        assert (found.positions[0] >= 0).all()
