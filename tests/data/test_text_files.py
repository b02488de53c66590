from collections.abc import Iterator
from pathlib import Path

import pytest

from mbpa_lm.config import DataConfig
from mbpa_lm.data import text_files
from mbpa_lm.data.corpora import WIKITEXT_TITLE, Corpus, open_corpus
from mbpa_lm.data.pieces import SPLITS, Piece, split_documents
from mbpa_lm.data.text_files import WholeText, hold_out, read_pieces
from mbpa_lm.errors import DataError


def text_of(corpus: Corpus, split: str) -> str:
    return "".join(piece.text for piece in corpus.pieces(split))


def documents(pieces: Iterator[Piece]) -> list[str]:
    texts: list[str] = []
    for piece in pieces:
        if piece.starts_document:
            texts.append("")
        texts[-1] += piece.text
    return texts


def test_pieces_of_any_size_join_to_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"naïve line {number} with words ☕\n" for number in range(50)) + "a-word-longer-than-a-piece" * 3
    (tmp_path / "text").write_text(text, encoding="utf-8")
    size = (tmp_path / "text").stat().st_size
    for piece_bytes in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
        pieces = list(read_pieces(tmp_path / "text", 0, size))
        assert "".join(piece.text for piece in pieces) == text + "\n"
        assert [piece.starts_document for piece in pieces] == [True, *[False] * (len(pieces) - 1)]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfhello\n")
    assert [piece.text for piece in read_pieces(tmp_path / "text", 0, 9)] == ["hello\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"good\nb\xe9d\n", "is not UTF-8: byte 0xe9 at offset 6; convert it first")],
)
def test_what_is_not_text_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} {message}"):
        list(read_pieces(path, 0, len(content)))


def test_documents_start_at_titles_in_whatever_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " \n = First = \n \n words\n = = Section = = \n more\n = Second = \n words\n"
    (tmp_path / "text").write_text(text)
    for piece_bytes in (20, 40, 1 << 20):
        monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
        pieces = split_documents(read_pieces(tmp_path / "text", 0, len(text)), WIKITEXT_TITLE)
        assert documents(pieces) == [text[: text.index(" = Second")], text[text.index(" = Second") :]]


def test_one_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "notes.txt").write_text(text)
    corpus = open_corpus(DataConfig(corpus="text", path=str(tmp_path / "notes.txt"), valid_fraction=0.1, test_fraction=0.2))
    parts = [text_of(corpus, split) for split in SPLITS]
    assert "".join(parts) == text
    assert len(parts[1]) == pytest.approx(0.1 * len(text), rel=0.05)
    assert len(parts[2]) == pytest.approx(0.2 * len(text), rel=0.05)


def test_a_folder_holds_out_whole_files_and_a_new_file_moves_few(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"file {number}\n" * 20)
    config = DataConfig(corpus="text", path=str(tmp_path), valid_fraction=0.1, test_fraction=0.1)
    before = {split: set(text_of(open_corpus(config), split).splitlines()) for split in SPLITS}
    assert [len(before[split]) for split in SPLITS] == pytest.approx([32, 4, 4], abs=1)
    (tmp_path / "new.txt").write_text("new\n" * 20)
    after = {split: set(text_of(open_corpus(config), split).splitlines()) for split in SPLITS}
    assert sum(len(before[split] - after[split]) for split in SPLITS) <= 2


def test_hidden_files_and_folders_are_not_read(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in (".git/index", ".hidden", "seen"):
        (tmp_path / name).write_text(f"{name}\n")
    assert text_of(WholeText(tmp_path, None), "test") == "seen\n"


@pytest.mark.parametrize("piece_bytes", [8, 1 << 20])
def test_a_pattern_of_blank_lines_starts_a_document_at_each_and_at_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    (tmp_path / "text").write_text("one\ntwo\n\nthree\n\nfour\n")
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    assert documents(WholeText(tmp_path / "text", r"\s*").pieces("test")) == ["one\ntwo\n", "\nthree\n", "\nfour\n"]


def test_held_out_parts_are_never_empty() -> None:
    assert hold_out([("a", 1), ("b", 1000), ("c", 1)], 0.01, 0.01) == ({"a"}, {"b"})


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a b\n")
    with pytest.raises(DataError, match=r"has no valid\.txt, test\.txt; a corpus folder holds"):
        open_corpus(DataConfig(corpus="text", path=str(tmp_path)))


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path .*nowhere does not exist"):
        open_corpus(DataConfig(corpus="text", path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="does not exist"):
        WholeText(tmp_path / "nowhere", None)


def test_the_fingerprint_changes_with_the_text_and_the_pattern(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text("a b c\n")
    config = DataConfig(corpus="text", path=str(tmp_path))
    first = open_corpus(config).fingerprint("train")
    assert first == open_corpus(config).fingerprint("train")
    assert first != open_corpus(DataConfig(corpus="text", path=str(tmp_path), document_pattern="a.*")).fingerprint("train")
    (tmp_path / "train.txt").write_text("a b d\n")
    assert first != open_corpus(config).fingerprint("train")
