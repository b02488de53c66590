"""The datastore on disk: what it finds, and through which index."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore import indexing
from mbpa_lm.memory.datastore.cells import Cells
from mbpa_lm.memory.datastore.index import choose_cells, choose_kind, train_index
from mbpa_lm.memory.datastore.manifest import Layout, Source
from mbpa_lm.memory.datastore.store import Datastore
from tests.memory.stores import IDENTITY, LIKELY, D, all_entries, assert_finds_the_nearest, entries_from, make, queries


@pytest.mark.parametrize("key_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("counts", [(1,), (5, 1, 300), (40_000,)])
def test_it_finds_what_a_plain_search_finds(tmp_path: Path, counts: tuple[int, ...], key_type: str) -> None:
    layout = Layout(D, LIKELY, key_type)  # type: ignore[arg-type]
    store, expected = make(tmp_path / "m", *counts, layout=layout), all_entries(*counts)
    stored = Entries(expected.keys.to(getattr(torch, key_type)).float(), *expected.tensors()[1:])
    assert_finds_the_nearest(store, stored, queries(), 7)
    assert_finds_the_nearest(Datastore.open(tmp_path / "m", IDENTITY), stored, queries(), 7)


def test_copies_of_one_key_come_newest_first(tmp_path: Path) -> None:
    store = Datastore.create(tmp_path / "m", IDENTITY, Layout(D, LIKELY))
    entries = entries_from(0, 12)
    store.add(Entries(torch.ones(12, D), *entries.tensors()[1:]))
    assert store.search(torch.zeros(1, D), 20).positions[0, :12].tolist() == list(range(11, -1, -1))
    many = entries_from(0, 70_000)
    store.add(Entries(torch.ones(70_000, D), *many.tensors()[1:]))
    assert store.search(torch.zeros(3, D), 4).positions.tolist() == [[70_011, 70_010, 70_009, 70_008]] * 3


def test_nothing_is_found_in_an_empty_one(tmp_path: Path) -> None:
    found = make(tmp_path / "m").search(queries(2), 3)
    assert (found.positions == -1).all()
    assert found.squared_distances.isinf().all()
    assert found.entries.keys.shape == (2, 3, D)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
@pytest.mark.parametrize("count", [1, 30])
def test_cells_are_searched_as_faiss_searches_them(kind: Any, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, asked = torch.randn(12_000, 16, generator=generator).numpy(), torch.randn(count, 16, generator=generator).numpy()
    index = train_index(kind, keys, 50, lambda step: None)
    index.add(keys)
    for cells in (1, 7, 60):  # more than there are, at last
        index.nprobe = min(cells, 50)
        expected, found = index.search(asked, 20)[1], Cells.of(index).search(asked, 20, cells)
        assert (found == expected).mean() > 0.99  # two ways to round


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq", "hnsw"])
def test_an_index_finds_nearly_all_and_measures_exactly(tmp_path: Path, kind: str) -> None:
    store, expected = make(tmp_path / "m", 12_000), all_entries(12_000)
    exact = store.search(queries(), 32)
    store.build_index(kind)  # type: ignore[arg-type]
    store.add(entries_from(12_000, 50))  # found although the index does not hold them
    for opened in (store, Datastore.open(tmp_path / "m", IDENTITY)):
        record = opened.manifest.index
        assert record is not None
        assert (record.kind, record.entries, len(opened)) == (kind, 12_000, 12_050)
        assert record.recall["recall"] >= 0.95
        found = opened.search(queries(), 32)
        pairs = zip(exact.positions.tolist(), found.positions.tolist(), strict=True)
        shared = sum(len(set(one) & set(other)) for one, other in pairs)
        assert shared >= 0.9 * exact.positions.numel()
        rows = found.positions.clamp(max=11_999)
        measured = (expected.keys[rows] - queries()[:, None]).square().sum(-1)
        old = found.positions < 12_000
        torch.testing.assert_close(found.squared_distances[old], measured[old])
    newest = entries_from(12_000, 50).keys
    assert store.search(newest, 1).positions[:, 0].tolist() == list(range(12_000, 12_050))


def test_a_new_index_replaces_the_old_one(tmp_path: Path) -> None:
    store = make(tmp_path / "m", 2000)
    for kind in ("ivf_flat", "hnsw", "flat"):
        store.build_index(kind)  # type: ignore[arg-type]
        indexes = list((tmp_path / "m").glob("*.faiss"))
        assert len(indexes) == (0 if kind == "flat" else 1)
    assert_finds_the_nearest(store, all_entries(2000), queries(), 5)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    store = make(tmp_path / "m", 5, 3)
    entries, documents = store.entries_between(2, 8)
    assert entries.values.tolist() == [number * 7 % 1009 for number in range(2, 8)]
    assert documents.tolist() == [0, 0, 0, 1, 1, 1]
    assert store.manifest.documents == 2


def test_sources_are_recorded_with_their_entries(tmp_path: Path) -> None:
    store = make(tmp_path / "m")
    store.add(entries_from(0, 5), None, Source("a", "f", 0, 0, 10))
    store.add(entries_from(5, 5), None, Source("a", "f", 0, 0, 10))
    store.add(entries_from(10, 5), None, Source("b", "g", 10, 0, 5))
    assert [source.name for source in Datastore.open(tmp_path / "m").manifest.sources] == ["a", "b"]


def test_an_index_that_was_asked_for_stays_as_entries_are_added(tmp_path: Path) -> None:
    store = make(tmp_path / "m", 2000)
    store.build_index("hnsw")
    assert not store.needs_index()
    store.add(entries_from(2000, 1000))
    assert store.needs_index()
    store.build_index()
    assert store.manifest.index is not None
    assert store.manifest.index.kind == "hnsw"


def test_a_memory_limit_changes_no_result(tmp_path: Path) -> None:
    make(tmp_path / "m", 30_000)
    limited = Datastore.open(tmp_path / "m", memory_limit=1 << 20)
    assert_finds_the_nearest(limited, all_entries(30_000), queries(3), 5)
    assert limited.damaged() is None


def test_an_index_that_the_memory_cannot_hold_is_refused_and_made_smaller(tmp_path: Path) -> None:
    with make(tmp_path / "m", 2000) as store:
        store.build_index("ivf_flat")  # 2,000 x 24 bytes
    limit = 1 << 17  # a third of it holds 1,456 of them
    with pytest.raises(DatastoreError, match=r"ivf_flat over the 2,000 entries .* a third of .* memory.resident_gib"):
        Datastore.open(tmp_path / "m", memory_limit=limit)
    with Datastore.open(tmp_path / "m", memory_limit=limit, writable=True) as store:
        with pytest.raises(DatastoreError, match="an index hnsw over the 2,000 entries"):
            store.build_index("hnsw")
        store.build_index("ivf_pq")
    opened = Datastore.open(tmp_path / "m", memory_limit=limit)
    assert opened.manifest.index is not None
    assert opened.manifest.index.kind == "ivf_pq"


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq", "hnsw"])
def test_keys_can_be_kept_in_the_index_alone(tmp_path: Path, kind: str) -> None:
    store, expected = make(tmp_path / "m", 12_000), all_entries(12_000)
    store.build_index(kind)  # type: ignore[arg-type]
    store.close()
    reader, before = Datastore.open(tmp_path / "m"), store.search(queries(), 5)
    with Datastore.open(tmp_path / "m", writable=True) as store:
        store.give_up_keys()
        assert (tmp_path / "m" / "keys.bin").stat().st_size == 0
        store.add(entries_from(12_000, 300))
    torch.testing.assert_close(reader.search(queries(), 5).positions, before.positions)  # what it has open stays
    more = all_entries(12_000, 300)
    for opened in (store, Datastore.open(tmp_path / "m", IDENTITY)):
        assert opened.damaged() is None
        found, keys = opened.search(queries(), 5), opened.entries_between(11_990, 12_010)[0].keys
        wanted = more.keys[found.positions]
        measured = (found.entries.keys.float() - queries()[:, None]).square().sum(-1)
        torch.testing.assert_close(found.squared_distances, measured)
        assert torch.equal(keys[10:].float(), more.keys[12_000:12_010])
        if kind != "ivf_pq":  # the others keep them in half precision, in which these are exact
            assert torch.equal(found.entries.keys.float(), wanted)
            assert torch.equal(keys[:10].float(), expected.keys[11_990:])
    with Datastore.open(tmp_path / "m", writable=True) as store:
        with pytest.raises(DatastoreError, match="has no index over all its entries; make one first"):
            store.give_up_keys()
        other = "hnsw" if kind == "ivf_flat" else "ivf_flat"
        with pytest.raises(DatastoreError, match=rf"kept in its index alone, which is {kind} and stays so"):
            store.build_index(other)  # type: ignore[arg-type]
        store.build_index()
        store.give_up_keys()
        store.add(entries_from(12_300, 7))
        last = entries_from(12_300, 7)
        assert store.search(last.keys, 1).positions[:, 0].tolist() == list(range(12_300, 12_307))


def test_keys_that_were_given_up_and_are_still_there_are_cut_off(tmp_path: Path) -> None:
    with make(tmp_path / "m", 2000) as store:
        store.build_index("ivf_flat")
        keys = (tmp_path / "m" / "keys.bin").read_bytes()
        store.give_up_keys()
    (tmp_path / "m" / "keys.bin").write_bytes(keys)  # as if it had been killed in between
    found = Datastore.open(tmp_path / "m").search(queries(), 5)
    with Datastore.open(tmp_path / "m", writable=True) as store:
        store.add(entries_from(2000, 10))
    opened = Datastore.open(tmp_path / "m")
    assert opened.damaged() is None
    assert torch.equal(opened.search(queries(), 5).positions < 2000, torch.ones(20, 5, dtype=torch.bool))
    assert torch.equal(opened.search(queries(), 5).positions, found.positions)
    assert torch.equal(opened.entries_between(2000, 2010)[0].keys.float(), entries_from(2000, 10).keys)


def test_a_graph_that_finds_too_little_can_be_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "RECALL_WANTED", 1.1)  # as where many keys are the same
    store = make(tmp_path / "m", 700)
    store.build_index("hnsw")
    assert store.manifest.index is not None
    assert store.manifest.index.search["effort"] == 700
    store.close()
    assert len(Datastore.open(tmp_path / "m")) == 700


def test_a_graph_is_not_for_gpus(tmp_path: Path) -> None:
    make(tmp_path / "m", 2000).build_index("hnsw")
    with pytest.raises(DatastoreError, match=r"hnsw is searched on the CPU; leave memory.gpus out"):
        Datastore.open(tmp_path / "m", gpus="shard")


def test_the_index_suits_the_size_and_the_memory() -> None:
    layout = Layout(400)
    assert choose_kind(1000, layout) == "flat"
    assert choose_kind(1_000_000, layout) == "ivf_flat"
    assert choose_kind(100_000_000, layout) == "ivf_pq"
    assert choose_kind(1_000_000, layout, memory_limit=1 << 30) == "ivf_pq"
    assert choose_cells(1_000_000, 400) == 4000
    assert choose_cells(1_000_000, 400, memory_limit=1 << 30) == 1398  # 40 keys of 1,600 bytes for each: 89 MB
    assert choose_cells(10, 400) == 1
