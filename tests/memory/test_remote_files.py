"""The memory on Milvus: what survives, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mbpa_lm.errors import ConfigError, DatastoreError
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.remote.settings import TOKEN, USER
from tests.memory.milvus import (
    IDENTITY,
    LAYOUT,
    LIKELY,
    NAME,
    SECRET,
    D,
    K,
    LiteServer,
    assert_same,
    opened,
    pymilvus,
    queries,
    some_entries,
)

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
