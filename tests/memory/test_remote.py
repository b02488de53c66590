"""The memory on Milvus, in Milvus Lite for real: what it finds, what survives, what it refuses, and a server that goes away."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mbpa_lm.errors import ConfigError, DatastoreError
from mbpa_lm.memory.base import Entries, Neighbours, SearchesAhead
from mbpa_lm.memory.composite import CompositeMemory, JoinedStores
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.memory.remote.collection import Collection
from mbpa_lm.memory.remote.memory import RemoteMemory
from mbpa_lm.memory.remote.rows import from_rows, output_fields, to_rows
from mbpa_lm.memory.remote.settings import PASSWORD, TOKEN, USER, RemoteSettings
from mbpa_lm.memory.remote.store import RemoteStore
from mbpa_lm.memory.window import WindowMemory
from tests.conftest import ListedStore

grpc = pytest.importorskip("grpc", reason="a memory on Milvus needs grpc")
pymilvus = pytest.importorskip("pymilvus", reason="a memory on Milvus needs pymilvus")
lite = pytest.importorskip("milvus_lite.adapter.grpc.server", reason="these tests need milvus-lite")

D, LIKELY, K = 4, 3, 5
IDENTITY, LAYOUT = Identity("a" * 64, "b" * 64), Layout(D, LIKELY)
NAME = "mbpa_lm"
SECRET = "a-very-secret-token"


def some_entries(count: int, seed: int = 0) -> Entries:
    """Entries at few places, so that distances are equal often; exact in half precision."""
    generator = torch.Generator().manual_seed(seed)
    return Entries(
        torch.randint(-3, 4, (count, D), generator=generator).float(),
        torch.randint(0, 2**31, (count,), generator=generator),
        torch.randn(count, generator=generator),
        torch.randint(0, 9, (count, LIKELY), generator=generator, dtype=torch.int32),
        torch.randint(0, 9, (count, LIKELY), generator=generator) / 16,
    )


def queries(count: int = 20) -> torch.Tensor:
    return torch.randint(-3, 4, (count, D), generator=torch.Generator().manual_seed(5)).float()


def opened(folder: Path, layout: Layout = LAYOUT, identity: Identity = IDENTITY, **settings: Any) -> RemoteStore:
    return RemoteStore(RemoteSettings(**{"address": str(folder / "m.db"), "batch": 16, **settings}), identity, layout)


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    """Assert that they are equal to the bit, whatever types they come in."""
    assert torch.equal(found.positions, expected.positions)
    torch.testing.assert_close(found.squared_distances, expected.squared_distances, rtol=0, atol=0)
    for one, other in zip(found.entries.tensors(), expected.entries.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, check_dtype=False)


class LiteServer:
    """Milvus Lite at a port of this machine, reached like a server elsewhere."""

    def __init__(self, file: Path) -> None:
        self._file, self._port, self._running = file, 0, False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server, self._database, self._port = lite.start_server_in_thread(str(self._file), port=self._port)
        self._running = True

    def stop(self) -> None:
        if self._running:
            self._server.stop(grace=None).wait()
            self._database.close()
            self._running = False

    def client(self) -> Any:
        return pymilvus.MilvusClient(self.address, dedicated=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiteServer]:
    """A server over the file that `opened` opens in the test's folder; the two cannot be open at once."""
    running = LiteServer(tmp_path / "m.db")
    running.start()
    yield running
    running.stop()


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


# What survives


def test_what_was_written_is_found_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(some_entries(50))
        before = store.search(queries(), K)
    with opened(tmp_path) as store:
        assert len(store) == 50
        assert_same(store.search(queries(), K), before)
        store.add(some_entries(7, seed=1))
        after = store.search(queries(), K)
    with opened(tmp_path) as store:
        assert len(store) == 57
        assert_same(store.search(queries(), K), after)


def test_the_documents_of_entries_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add(some_entries(50), torch.arange(50) // 10)
    server = LiteServer(tmp_path / "m.db")
    server.start()
    client = server.client()
    client.load_collection(NAME)
    assert [row["document"] for row in client.get(NAME, [9, 42], output_fields=["document"])] == [0, 4]
    server.stop()


WRITE = """
import os, sys, torch
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.remote.memory import RemoteMemory
from mbpa_lm.memory.remote.settings import RemoteSettings
from mbpa_lm.memory.remote.store import RemoteStore
assert "pymilvus" not in sys.modules  # only a memory that is opened needs it
store = RemoteStore(RemoteSettings(sys.argv[1], batch=16), Identity("a" * 64, "b" * 64), Layout(4))
keys, words = torch.arange(180).view(45, 4) / 8, torch.zeros(45, 0)
store.add(Entries(keys, torch.arange(45), torch.zeros(45), words, words).rows(slice(0, 40)))
"""
KILLED = "store.flush(); store.add(Entries(keys, *[keys[:, 0]] * 2, words, words)); os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(("end", "code", "written"), [(KILLED, -9, {40, 56, 72}), ("", 0, {40})])
def test_what_was_acknowledged_outlives_its_process(tmp_path: Path, end: str, code: int, written: set[int]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WRITE + end, str(tmp_path / "m.db")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    with opened(tmp_path, Layout(D)) as store:
        assert len(store) in written  # what was flushed, or, where the process ended by itself, everything
        whole = min(40, len(store))
        found = store.search(torch.arange(180).view(45, 4)[:whole] / 8, 100)
        assert all(number in found.entries.values[number].tolist()[:2] for number in range(whole))


# What is refused


@pytest.mark.parametrize(
    ("identity", "layout", "message"),
    [
        (replace(IDENTITY, model="c" * 64), LAYOUT, "was written with model aaaaaaaaaaaa, this model is cccccccccccc;"),
        (
            replace(IDENTITY, tokenizer="c" * 64),
            LAYOUT,
            "was written with tokenizer bbbbbbbbbbbb, this tokenizer is cccccccccccc;",
        ),
        (IDENTITY, Layout(D + 1, LIKELY), "float16 keys of 4 numbers with 3 likely words, not float16 keys of 5 numbers"),
        (IDENTITY, Layout(D, LIKELY, "float32"), "holds float16 keys of 4 numbers with 3 likely words, not float32 keys"),
        (IDENTITY, Layout(D), "with 3 likely words, not float16 keys of 4 numbers with 0 likely words; build it again"),
    ],
)
def test_a_memory_of_another_model_or_layout_is_refused(
    tmp_path: Path, identity: Identity, layout: Layout, message: str
) -> None:
    opened(tmp_path).close()
    with pytest.raises(DatastoreError, match=message) as raised:
        opened(tmp_path, layout, identity)
    assert f"collection {NAME} at {tmp_path / 'm.db'}" in str(raised.value)
    opened(tmp_path).close()  # and the file is free again


@pytest.mark.parametrize(
    ("properties", "message"),
    [({}, "is not a memory of mbpa_lm"), ({"mbpa_lm": '{"format": 99}'}, "format 99; this version reads format 1")],
)
def test_other_collections_are_refused(tmp_path: Path, server: LiteServer, properties: dict[str, str], message: str) -> None:
    schema = pymilvus.MilvusClient.create_schema()
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=2)
    server.client().create_collection("things", schema=schema, properties=properties)
    with pytest.raises(DatastoreError, match=f"collection things at {server.address} .*{message}"):
        opened(tmp_path, address=server.address, collection="things")


def test_a_memory_with_missing_entries_is_refused(tmp_path: Path, server: LiteServer) -> None:
    with opened(tmp_path, address=server.address) as store:
        store.add(some_entries(20))
    server.client().delete(NAME, ids=[3])
    with pytest.raises(DatastoreError, match="holds 19 entries, but not the first 19"):
        opened(tmp_path, address=server.address)


def test_a_file_that_is_open_or_none_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(DatastoreError, match=r"m\.db is open already"):
        opened(tmp_path)
    (tmp_path / "old.db").write_text("of an old Milvus Lite")
    with pytest.raises(DatastoreError, match=r"old\.db cannot be opened: File exists"):
        opened(tmp_path, address=str(tmp_path / "old.db"))


def test_what_is_closed_says_so(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.close()
    store.close()
    for call in (lambda: store.search(queries(), K), lambda: store.add(some_entries(1)), store.flush):
        with pytest.raises(DatastoreError, match=r"m\.db is closed; open the memory again"):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "milvus:19530"}, "must be a file that ends in .db, or http"),
        ({"address": f"http://user:{SECRET}@milvus:19530"}, f"must hold no user or password; set {TOKEN}, or {USER}"),
        ({"index": "HNSW"}, "index must be FLAT for .*m.db, not HNSW"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        opened(tmp_path, **settings)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("missing", ["pymilvus", "milvus_lite.adapter.grpc.server"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DatastoreError, match=rf"needs {missing}, which is not installed; pip install \"mbpa_lm\[remote\]\""):
        opened(tmp_path)


# A server that stays away, refuses, or comes back


def test_an_address_where_nothing_listens_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(DatastoreError, match=f"^{address} could not be reached: connecting was tried 2 times") as raised:
            opened(tmp_path, address=address, attempts=2, wait_s=0.1)
    assert 0.1 <= time.monotonic() - begin < 5
    assert SECRET not in str(raised.value)


class Deny(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Refuses every call, and repeats the credentials that came with it."""

    def service(self, details: Any) -> Any:
        def refuse(request: bytes, context: Any) -> None:
            context.abort(self.code, f"who is {SECRET}?")

        return grpc.unary_unary_rpc_method_handler(refuse)

    def __init__(self, code: Any) -> None:
        self.code = code


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("UNAUTHENTICATED", f"refused connecting: not authenticated; set {TOKEN}, or {USER} and {PASSWORD}"),
        ("INVALID_ARGUMENT", r"connecting failed in collection mbpa_lm at http"),
    ],
)
@pytest.mark.parametrize("environment", [{TOKEN: SECRET}, {USER: "someone", PASSWORD: SECRET}])
def test_a_refusal_does_not_show_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Deny(grpc.StatusCode[code])])
    address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with pytest.raises(DatastoreError, match=message) as raised:
            opened(tmp_path, address=address, wait_s=60)  # a refusal is not tried again
        assert SECRET not in str(raised.value)
        assert "\n" not in str(raised.value)
    finally:
        server.stop(grace=None)


def test_half_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, SECRET)
    with pytest.raises(ConfigError, match=f"{PASSWORD} is set and {USER} is not; set both, or {TOKEN}"):
        opened(tmp_path, address="http://127.0.0.1:1")
    opened(tmp_path).close()  # a file needs none


def test_a_server_that_comes_back_gets_every_entry_once(tmp_path: Path, server: LiteServer) -> None:
    with opened(tmp_path, address=server.address, attempts=8, wait_s=0.1) as store:
        store.add(some_entries(32))
        store.flush()
        server.stop()
        store.add(some_entries(40, seed=1))
        time.sleep(0.2)
        server.start()
        store.flush()
        assert server.client().query(NAME, filter="", output_fields=["count(*)"])[0]["count(*)"] == 72


def test_a_write_that_fails_is_told_by_the_next_call(tmp_path: Path, server: LiteServer) -> None:
    store = opened(tmp_path, address=server.address, attempts=2, wait_s=0.05)
    store.add(some_entries(32))
    store.flush()
    server.stop()
    store.add(some_entries(20, seed=1))
    message = "could not be reached: writing was tried 2 times .* the 32 entries before are written: open the memory again"
    with pytest.raises(DatastoreError, match=message):
        store.flush()
    for call in (lambda: store.search(queries(), K), lambda: store.add(some_entries(1)), store.close):
        with pytest.raises(DatastoreError, match=message):
            call()
    server.start()
    with opened(tmp_path, address=server.address) as store:
        assert len(store) == 32


def test_a_write_that_is_refused_is_told_by_the_next_call(tmp_path: Path, server: LiteServer) -> None:
    store = opened(tmp_path, address=server.address)
    server.client().drop_collection(NAME)
    store.add(some_entries(20))
    with pytest.raises(DatastoreError, match=r"^writing failed in collection mbpa_lm at .*does not exist.*; the 0 entries"):
        store.close()
