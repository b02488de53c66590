"""A text read into a datastore: the entries that reading it in one go leaves behind, however often it is interrupted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.remembering import remember as module
from mbpa_lm.remembering.remember import Text, remember
from tests.conftest import small_model

TOKENS = np.random.default_rng(0).integers(0, 30, 301).astype(np.uint16)
TEXT = Text("a text", "f" * 64, TOKENS, np.array([0, 100, 250]))
KINDS = ["lstm", "transformer"]


def empty(folder: Path, likely: int = 4) -> Datastore:
    return Datastore.create(folder, Identity("m", "t"), Layout(16, likely, "float32"))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_those_of_reading_it_in_one_go(tmp_path: Path, kind: str) -> None:
    model = small_model(kind).float()
    store = empty(tmp_path / "m")
    remember(store, model, TEXT)
    entries, documents = store.entries_between(0, 300)
    with torch.no_grad():
        hidden_states = model(torch.from_numpy(TOKENS[None, :-1].astype(np.int64))).hidden_states[0]
        logits = model.output_layer().logits(hidden_states)
    torch.testing.assert_close(entries.keys, hidden_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entries.log_partitions, logits.logsumexp(1), rtol=1e-4, atol=1e-5)
    assert entries.values.tolist() == TOKENS[1:].tolist()
    likeliest = logits.softmax(1).topk(4)
    assert torch.equal(entries.likely_words.sort(1).values, likeliest.indices.int().sort(1).values)
    torch.testing.assert_close(entries.likely_probabilities.float().sum(1), likeliest.values.sum(1), rtol=0, atol=2e-3)
    assert documents.tolist() == [0] * 100 + [1] * 150 + [2] * 50


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_text_goes_on_to_the_same_entries(
    tmp_path: Path, kind: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT._replace(apart=apart)
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "SIDE_BY_SIDE", 3)
    monkeypatch.setattr(module, "WARM_UP", 20)
    model = small_model(kind).float()
    whole, interrupted = empty(tmp_path / "whole"), empty(tmp_path / "interrupted")
    remember(whole, model, text)

    def interrupt(done: int) -> None:
        raise Interrupted

    while len(interrupted) < text.entries:
        with pytest.raises(Interrupted):
            remember(interrupted, model, text, interrupt)
        interrupted.close()
        interrupted = Datastore.open(tmp_path / "interrupted", writable=True)
    remember(interrupted, model, text, interrupt)  # nothing is left to do
    assert whole.manifest == interrupted.manifest


@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_are_apart_are_read_each_on_its_own(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 70)
    monkeypatch.setattr(module, "WARM_UP", 200)
    model, text = small_model(kind).float(), TEXT._replace(document_starts=np.array([0, 100, 100, 250]), apart=True)
    store = empty(tmp_path / "m")
    remember(store, model, text)
    assert len(store) == text.entries == 298  # the last token of each of three has none after it
    entries, documents = store.entries_between(0, 298)
    values, keys = [], []
    for begin, end in ((0, 100), (100, 250), (250, 301)):
        values += TOKENS[begin + 1 : end].tolist()
        with torch.no_grad():
            keys.append(model(torch.from_numpy(TOKENS[None, begin : end - 1].astype(np.int64))).hidden_states[0])
    assert entries.values.tolist() == values
    torch.testing.assert_close(entries.keys, torch.cat(keys), rtol=1e-4, atol=1e-5)
    assert documents.tolist() == [0] * 99 + [2] * 149 + [3] * 50


def test_a_block_depends_on_the_warm_up_before_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 50)
    monkeypatch.setattr(module, "WARM_UP", 10)
    model, other = small_model("lstm").float(), TOKENS.copy()
    other[:90] = 3
    one, two = empty(tmp_path / "one"), empty(tmp_path / "two")
    remember(one, model, TEXT)
    remember(two, model, TEXT._replace(tokens=other))
    assert torch.equal(one.entries_between(100, 300)[0].keys, two.entries_between(100, 300)[0].keys)
    assert not torch.equal(one.entries_between(90, 100)[0].keys, two.entries_between(90, 100)[0].keys)


def test_texts_follow_one_another_with_documents_of_their_own(tmp_path: Path) -> None:
    model, store = small_model("lstm").float(), empty(tmp_path / "m")
    remember(store, model, TEXT)
    remember(store, model, Text("b", "g" * 64, TOKENS[:51], np.array([0])))
    remember(store, model, TEXT)  # it is there already
    assert len(store) == 350
    assert store.manifest.documents == 4
    assert store.entries_between(300, 350)[1].tolist() == [3] * 50


def test_another_text_waits_until_the_one_before_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    model, store = small_model("lstm").float(), empty(tmp_path / "m")

    def interrupt(done: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        remember(store, model, TEXT, interrupt)
    with pytest.raises(DatastoreError, match="holds only a part of a text, its build was interrupted; go on with that text"):
        remember(store, model, Text("b", "g" * 64, TOKENS[:51], np.array([0])))
