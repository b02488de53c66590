"""The files of a datastore: what survives, and what is refused."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.datastore import entry_files, manifest
from mbpa_lm.memory.datastore.index import read_index
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.plausible import check_plausible
from mbpa_lm.memory.datastore.store import LOCK, Datastore
from mbpa_lm.system.durable import sealed, take_lock
from tests.memory.stores import IDENTITY, LIKELY, D, all_entries, assert_finds_the_nearest, entries_from, make, queries

COLUMN_FILES = ["keys", "values", "log_partitions", "documents", "likely_words", "likely_probabilities"]


def test_a_memory_of_another_model_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    make(tmp_path / "m", 3)
    with pytest.raises(DatastoreError, match=r"written with model aaaaaaaaaaaa, this model is cccccccccccc; build another one"):
        Datastore.open(tmp_path / "m", Identity("c" * 64, "b" * 64))
    with pytest.raises(DatastoreError, match=r"with tokenizer bbbbbbbbbbbb, this tokenizer is dddddddddddd"):
        Datastore.open(tmp_path / "m", Identity("a" * 64, "d" * 64))


def corrupt(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut short":
        path.write_bytes(data[:-1])
    elif how == "altered":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut short", "altered", "deleted"])
@pytest.mark.parametrize("name", [*(f"{column}.bin" for column in COLUMN_FILES), "index-1.faiss"])
def test_damage_is_found_when_it_is_opened_and_by_verification(tmp_path: Path, name: str, how: str) -> None:
    store = make(tmp_path / "m", 70_000 if name == "keys.bin" else 2000)
    store.build_index("ivf_flat")
    assert store.damaged() is None
    corrupt(tmp_path / "m" / name, how)
    with pytest.raises(DatastoreError, match=rf"{name}.*(cut short|altered|cannot be read|not what was written)"):
        Datastore.open(tmp_path / "m")


@pytest.mark.parametrize(
    ("column", "number", "told"),
    [
        ("values", 1009, "a next token from .* to 1009"),
        ("values", 2**31 - 1, "a next token"),
        ("values", -(2**31), "a next token"),
        ("likely_words", 2**31 - 1, "a likely word"),
        ("likely_words", -1, "a likely word"),
        ("likely_probabilities", math.nan, "a probability"),
        ("likely_probabilities", 2.0, "a probability"),
        ("log_partitions", math.inf, "a log-partition"),
        ("keys", math.nan, "a distance"),
        ("keys", math.inf, "a distance"),
    ],
)
def test_what_no_model_writes_is_refused_before_it_is_used(tmp_path: Path, column: str, number: float, told: str) -> None:
    """Compiled loops would read and write elsewhere in memory."""
    make(tmp_path / "m", 300).close()
    found = Datastore.open(tmp_path / "m", vocabulary_size=1009).search(queries(), 20)
    if column == "keys":
        found.squared_distances[3, 5] = number  # which is computed from the key
    else:
        getattr(found.entries, column)[3, 5] = number
    with pytest.raises(DatastoreError, match=rf"m holds {told}.*, which no model of 1,009 words writes; build it again"):
        check_plausible(found, 1009, tmp_path / "m")


def test_a_store_looks_at_what_it_finds_for_a_model(tmp_path: Path) -> None:
    make(tmp_path / "m", 300).close()
    Datastore.open(tmp_path / "m").search(queries(), 300)
    with pytest.raises(DatastoreError, match=r"holds a next token from .*, which no model of 9 words writes"):
        Datastore.open(tmp_path / "m", vocabulary_size=9).search(queries(), 300)


def test_a_creation_that_was_killed_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Datastore.create(tmp_path / "m", IDENTITY, Layout(D, LIKELY))
    monkeypatch.undo()
    (tmp_path / "m" / f".{manifest.FILE}.saving").write_text("{")  # as SIGKILL leaves it
    Datastore.create(tmp_path / "m", IDENTITY, Layout(D, LIKELY)).close()


def test_verification_reads_what_opening_trusts(tmp_path: Path) -> None:
    path = tmp_path / "m" / "values.bin"
    make(tmp_path / "m", 2000).close()
    stamp = path.stat()
    corrupt(path, "altered")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    store = Datastore.open(tmp_path / "m")  # of the size and time that it had
    assert store.damaged() == "values.bin (entries 0 to 1,999)"


@pytest.mark.parametrize(
    "change", [("entries", 1), ("identity", {"model": "c", "tokenizer": "d"}), ("format", 9), ("index", {})]
)
def test_an_altered_manifest_is_refused(tmp_path: Path, change: tuple[str, object]) -> None:
    make(tmp_path / "m", 5)
    path = tmp_path / "m" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), change[0]: change[1]}))
    with pytest.raises(DatastoreError, match=r"manifest.json is damaged|is a memory of format 9; this version reads format 1"):
        Datastore.open(tmp_path / "m")


IMPOSSIBLE = [
    {"entries": -5},
    {"entries": float("inf")},
    {"documents": "many"},
    {"identity": {"model": 5, "tokenizer": "b"}},
    {"layout": {"hidden_size": D, "likely_words": LIKELY, "key_type": "int8"}},
    {"layout": {"hidden_size": "8", "likely_words": LIKELY, "key_type": "float16"}},
    {"layout": {"hidden_size": D, "likely_words": 10**12, "key_type": "float16"}},
    {"sources": [{"name": "a", "fingerprint": "b", "first_entry": -1, "first_document": 0, "entries": 3}]},
    {"index": {"file": "../x.faiss"}},
    {"index": {"kind": "other"}},
    {"index": {"entries": 10**9}},
    {"index": {"search": {"effort": 10**12, "cells": 3}}},
    {"index": {"recall": {}}},
]


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_a_stranger_s_manifest_is_checked_before_anything_is_made_of_it(tmp_path: Path, change: dict[str, Any]) -> None:
    make(tmp_path / "m", 2000).build_index("ivf_flat")
    path = tmp_path / "m" / "manifest.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    for name, value in change.items():
        values[name] = {**values[name], **value} if name == "index" else value
    path.write_text(json.dumps(sealed(values)))
    with pytest.raises(DatastoreError, match=r"manifest.json is damaged") as error:
        Datastore.open(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["keys.bin", "manifest.json", "index-1.faiss"])
def test_a_memory_whose_files_lie_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "m", 2000).build_index("ivf_flat")
    path, elsewhere = tmp_path / "m" / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(DatastoreError, match="is a link"):
        Datastore.open(tmp_path / "m")


def test_another_index_than_was_recorded_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "other", 1500).build_index("ivf_flat")
    store = make(tmp_path / "m", 2000)
    store.build_index("ivf_flat")
    shutil.copy(tmp_path / "other" / "index-1.faiss", tmp_path / "m" / "index-1.faiss")
    record = store.manifest.index
    assert record is not None
    with pytest.raises(DatastoreError, match="it is another index than was recorded"):
        read_index(tmp_path / "m" / "index-1.faiss", record, D)
    with pytest.raises(DatastoreError, match=r"index-1.faiss is not what was written"):
        Datastore.open(tmp_path / "m")


def test_only_who_opened_it_to_write_can_write(tmp_path: Path) -> None:
    make(tmp_path / "m", 5).close()
    reader = Datastore.open(tmp_path / "m")
    for write in (lambda: reader.add(entries_from(5, 1)), lambda: reader.build_index("hnsw")):
        with pytest.raises(DatastoreError, match="was opened to be read; open it to be written"):
            write()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    store, entries = make(tmp_path / "m", 5), entries_from(5, 3)
    with pytest.raises(DatastoreError, match=r"keys.bin cannot hold a number that is not finite in float16.*memory.key_type"):
        store.add(replace(entries, keys=entries.keys * 1e9))
    with pytest.raises(ValueError, match="keys of another shape than the memory's"):
        store.add(replace(entries, keys=entries.keys.repeat(1, 2)))
    with pytest.raises(DatastoreError, match="5 entries are too few for ivf_pq, which needs 1,000"):
        store.build_index("ivf_pq")
    assert len(Datastore.open(tmp_path / "m")) == 5


def test_a_creation_that_was_interrupted_begins_again(tmp_path: Path) -> None:
    make(tmp_path / "m").close()
    (tmp_path / "m" / "manifest.json").unlink()
    assert len(make(tmp_path / "m", 3)) == 3


def test_what_interrupted_writes_have_left_is_removed(tmp_path: Path) -> None:
    store = make(tmp_path / "m", 2000)
    store.build_index("hnsw")
    store.close()
    for name in ("index-7.faiss", ".index-8.faiss.saving"):
        (tmp_path / "m" / name).write_bytes(b"x")
    Datastore.open(tmp_path / "m", writable=True).close()
    assert [path.name for path in (tmp_path / "m").glob("*index-*")] == ["index-1.faiss"]


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"format": 1}', "\xff"])
def test_what_is_no_memory_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "m").mkdir()
    if content is not None:
        (tmp_path / "m" / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DatastoreError) as error:
        Datastore.open(tmp_path / "m", writable=True)
    assert "\n" not in str(error.value)


def test_a_folder_in_use_is_not_written_over(tmp_path: Path) -> None:
    make(tmp_path / "m", 3)
    with pytest.raises(DatastoreError, match="is not empty; name another folder, or add to the memory"):
        make(tmp_path / "m")


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    make(tmp_path / "m", 3).close()
    held = take_lock(tmp_path / "m" / LOCK)
    assert held is not None
    with pytest.raises(DatastoreError, match="is being written by another process; wait until it is done"):
        Datastore.open(tmp_path / "m", writable=True)
    assert len(Datastore.open(tmp_path / "m")) == 3
    os.close(held)
    Datastore.open(tmp_path / "m", writable=True).close()


@pytest.mark.parametrize("call", [1, 3, 6, 7, 8])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls, fsync = make(tmp_path / "m", 100), [0], os.fsync

    def fails(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(28, os.strerror(28))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    there = 150 if call == 8 else 100  # the last call syncs the folder, in which the manifest has been replaced already
    with pytest.raises(DatastoreError, match=rf"No space left on device; the {there} that it counts are whole"):
        store.add(entries_from(100, 50))
    monkeypatch.undo()
    counts = (100, 50) if there == 150 else (100,)
    assert_finds_the_nearest(store, all_entries(*counts), queries(), 5)
    assert len(Datastore.open(tmp_path / "m")) == there
    store.add(entries_from(there, 60))
    assert store.damaged() is None
    assert_finds_the_nearest(Datastore.open(tmp_path / "m"), all_entries(*counts, 60), queries(), 5)


def test_checksums_go_on_over_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_files, "BLOCK", 7)
    store = make(tmp_path / "m", 3)
    for count in (4, 1, 20, 0, 6, 7, 2):
        store.close()
        store = Datastore.open(tmp_path / "m", writable=True)
        store.add(entries_from(len(store), count))
        assert len(store.manifest.checksums["keys.bin"]) == -(-len(store) // 7)
        assert store.damaged() is None


def _add_without_end(folder: Path, acknowledged: Path, seed: int) -> None:
    """Make a memory or open it, add entries, index them, give up keys, until killed; write down how many there are."""
    generator = random.Random(seed)
    with acknowledged.open("w") as file:
        is_there = (folder / manifest.FILE).exists()
        store = Datastore.open(folder, IDENTITY, writable=True) if is_there else make(folder)
        while True:
            store.add(entries_from(len(store), generator.choice((1, 10, 500))))
            print(len(store), file=file, flush=True)
            if generator.random() < 0.1 and len(store) > 500:
                store.build_index("hnsw")
                if generator.random() < 0.3:
                    store.give_up_keys()


KILLS = int(os.environ.get("MBPA_KILLS", "5"))


def test_whenever_a_writer_is_killed_what_it_acknowledged_is_whole(tmp_path: Path) -> None:
    # A server that has imported everything, and never run anything that threads would survive in.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folder, acknowledged, generator = tmp_path / "m", tmp_path / "acknowledged", random.Random(KILLS)
    for kill in range(KILLS):
        acknowledged.unlink(missing_ok=True)
        writer = context.Process(target=_add_without_end, args=(folder, acknowledged, kill), daemon=True)
        writer.start()
        _wait_for(acknowledged.exists)
        time.sleep(generator.uniform(0.0, 0.4))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        lines = acknowledged.read_text().splitlines()
        if not lines and not (folder / manifest.FILE).exists():
            continue  # killed before it was made
        store = Datastore.open(folder, IDENTITY)
        assert len(store) >= int(lines[-1] if lines else 0)
        assert store.damaged() is None
        found, _ = store.entries_between(0, len(store))
        assert found.values.tolist() == [number * 7 % 1009 for number in range(len(store))]
        if len(store):
            last = found.keys[-1:].float()
            assert store.search(last, 1).squared_distances[0, 0] == 0
        if len(store) > 5_000:  # the next one is to be made again
            shutil.rmtree(folder)


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the writer did not start"
        time.sleep(0.01)
