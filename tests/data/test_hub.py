"""The hub's corpora through the real `datasets` library, on a local repository of parquet files."""

from pathlib import Path

import pytest

from mbpa_lm.config import DataConfig
from mbpa_lm.data import hub
from mbpa_lm.data.corpora import open_corpus
from mbpa_lm.data.pieces import SPLITS
from mbpa_lm.errors import DataError

ROWS = {
    "train": ["", " = Title = \n", "some words \n", "", " = Another = \n", "more"],
    "validation": [" = Only = \n", "a b"],
    "test": ["c d"],
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "repository"
    folder.mkdir()
    for split, rows in ROWS.items():
        parquet.write_table(pa.table({"text": rows}), folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(hub.SOURCES, "wikitext-2", hub._Source(str(folder), None, "main", "text"))
    return folder


def test_rows_are_lines_and_titles_start_documents(repository: Path) -> None:
    corpus = open_corpus(DataConfig(corpus="wikitext-2"))
    pieces = list(corpus.pieces("train"))
    assert "".join(piece.text for piece in pieces) == "\n = Title = \nsome words \n\n = Another = \nmore\n"
    assert [piece.text.strip().split(" \n")[0] for piece in pieces if piece.starts_document] == ["= Title =", "= Another ="]
    assert len({corpus.fingerprint(split) for split in SPLITS}) == 3


def test_a_corpus_that_cannot_be_loaded_says_what_to_do(repository: Path) -> None:
    (repository / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"wikitext-2 could not be loaded from the hub \(.*\); with no network, set data.path"):
        list(open_corpus(DataConfig(corpus="wikitext-2")).pieces("train"))
