"""The datastore of the training text: what is in it, kept once, and made again or refused where a file is damaged."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mbpa_lm.errors import RunFolderError
from mbpa_lm.memory.training_store import INDEX_FILE, VALUES_FILE, TrainingStore, training_store
from tests.conftest import small_model

TOKENS = np.random.default_rng(0).integers(0, 30, 301).astype(np.uint16)


def store(folder: Path, entries: int = 0, text: np.ndarray | None = TOKENS) -> TrainingStore:
    def read() -> np.ndarray:
        assert text is not None, "the kept files were to be used"
        return text

    return training_store(folder, small_model("lstm").float(), read, entries, cells_searched=4)


def test_every_context_finds_itself_and_the_word_that_followed(tmp_path: Path) -> None:
    model = small_model("lstm").float()
    with torch.no_grad():
        hidden_states = model(torch.from_numpy(TOKENS[None, :-1].astype(np.int64))).hidden_states[0]
    squared, values = store(tmp_path).nearest(hidden_states, 3)
    assert squared[:, 0].max() < 1e-6
    assert values[:, 0].tolist() == TOKENS[1:].tolist()


def test_fewer_entries_than_neighbours_leave_empty_places(tmp_path: Path) -> None:
    squared, _ = store(tmp_path, entries=5).nearest(torch.zeros(2, 16), 8)
    assert squared.isinf().sum(1).tolist() == [3, 3]


def test_it_is_made_once(tmp_path: Path) -> None:
    store(tmp_path)
    assert len(store(tmp_path, text=None).values_N) == 300
    assert len(store(tmp_path, entries=50).values_N) == 50  # other settings, another store


@pytest.mark.parametrize("name", [INDEX_FILE, VALUES_FILE])
def test_a_file_that_is_cut_short_is_made_again(tmp_path: Path, name: str) -> None:
    store(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-8])
    assert len(store(tmp_path).values_N) == 300
    store(tmp_path, text=None)


def test_an_index_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store(tmp_path)
    path = tmp_path / INDEX_FILE
    path.write_bytes(b"?" * path.stat().st_size)
    with pytest.raises(RunFolderError, match=r"datastore.faiss cannot be read.*delete it"):
        store(tmp_path)
