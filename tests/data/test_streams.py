import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbpa_lm.config import DataConfig
from mbpa_lm.data.corpora import open_corpus
from mbpa_lm.data.streams import ARRAYS, SequenceBatches, TokenStream, count_tokens, open_stream
from mbpa_lm.data.tokenizers import WordTokenizer
from mbpa_lm.errors import DataError
from mbpa_lm.system.durable import file_hash, read_json, sealed, unsealed


def wikitext_config(corpus: Path) -> DataConfig:
    return DataConfig(corpus="text", path=str(corpus), document_pattern=" = [^=]+ = ")


@pytest.fixture
def tokenizer(corpus: Path) -> WordTokenizer:
    return WordTokenizer.train(open_corpus(wikitext_config(corpus)).pieces("train"), 1, 0)


def open_valid(corpus: Path, tokenizer: WordTokenizer, folder: Path) -> TokenStream:
    return open_stream(open_corpus(wikitext_config(corpus)), "valid", tokenizer, folder)


def test_a_stream_has_the_words_lines_and_documents_of_the_text(corpus: Path, tokenizer: WordTokenizer, tmp_path: Path) -> None:
    text = (corpus / "valid.txt").read_text()
    stream = open_valid(corpus, tokenizer, tmp_path)
    words = text.replace("\n", " <eos> ").split()
    known = {tokenizer.token(index) for index in range(tokenizer.vocabulary_size)}
    assert [tokenizer.token(index) for index in stream.tokens] == [word if word in known else "<unk>" for word in words]
    assert stream.characters.sum() == len(text)
    assert stream.words.sum() == len(words)
    assert len(stream.document_starts) == 8
    assert all(tokenizer.token(stream.tokens[start]) == "=" for start in stream.document_starts)
    assert isinstance(stream.tokens, np.memmap)


def test_a_token_file_is_built_once_while_nothing_changes(corpus: Path, tokenizer: WordTokenizer, tmp_path: Path) -> None:
    open_valid(corpus, tokenizer, tmp_path)
    (folder,) = tmp_path.iterdir()
    written = (folder / "tokens.bin").stat().st_mtime_ns
    open_valid(corpus, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "tokens.bin").stat().st_mtime_ns == written
    open_valid(corpus, WordTokenizer.train(open_corpus(wikitext_config(corpus)).pieces("train"), 3, 0), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_token_outside_the_vocabulary_is_refused(corpus: Path, tokenizer: WordTokenizer, tmp_path: Path) -> None:
    open_valid(corpus, tokenizer, tmp_path)
    (folder,) = tmp_path.iterdir()
    tokens = np.fromfile(folder / "tokens.bin", dtype=np.uint16)
    tokens[3] = tokenizer.vocabulary_size
    tokens.tofile(folder / "tokens.bin")
    manifest = unsealed(read_json(folder / "manifest.json"))
    manifest["arrays"]["tokens"] = file_hash(folder / "tokens.bin")
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(DataError, match=rf"holds token id {tokens[3]}, outside the vocabulary of {tokens[3]}; delete it"):
        open_valid(corpus, tokenizer, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "no json", "no dtype", "tokens", "characters", "words", "document_starts"])
def test_a_damaged_token_file_is_refused(corpus: Path, tokenizer: WordTokenizer, tmp_path: Path, damage: str) -> None:
    open_valid(corpus, tokenizer, tmp_path)
    (folder,) = tmp_path.iterdir()
    if damage == "truncated":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    elif damage in ARRAYS:  # one digit of it
        content = bytearray((folder / f"{damage}.bin").read_bytes())
        content[40] ^= 1
        (folder / f"{damage}.bin").write_bytes(content)
    elif damage == "document_starts":
        manifest = read_json(folder / "manifest.json")
        manifest["document_starts"][-1] += 1
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        (folder / "manifest.json").write_text("{" if damage == "no json" else json.dumps({"tokens": 3}))
    with pytest.raises(DataError, match=r"is damaged .*; delete it and it will be built again"):
        open_valid(corpus, tokenizer, tmp_path)


def test_text_that_cannot_be_read_leaves_no_file(corpus: Path, tokenizer: WordTokenizer, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_bytes((corpus / f"{split}.txt").read_bytes())
    with (tmp_path / "valid.txt").open("ab") as file:
        file.write(b"\xff\xfe\n")
    tokens = tmp_path / "tokens"
    with pytest.raises(DataError, match="is not UTF-8"):
        open_valid(tmp_path, tokenizer, tokens)
    assert list(tokens.iterdir()) == []


def test_a_stream_of_one_token_is_refused(tokenizer: WordTokenizer, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("\n")
    with pytest.raises(DataError, match="valid has 1 tokens; a stream needs at least 2"):
        open_valid(tmp_path, tokenizer, tmp_path / "tokens")


@given(st.integers(1, 4), st.integers(1, 9), st.integers(60, 200), st.integers(0, 5))
def test_rows_continue_from_batch_to_batch(batch_size: int, sequence_length: int, count: int, epoch: int) -> None:
    batches = SequenceBatches(np.arange(count), batch_size, sequence_length)
    parts = list(batches.batches(seed=1, epoch=epoch))
    assert len(parts) == batches.steps
    inputs, targets = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    assert (targets == inputs + 1).all()  # tokens are their own positions here
    assert (np.diff(inputs, axis=1) == 1).all()
    assert len(np.unique(inputs)) == inputs.size
    resumed = list(batches.batches(seed=1, epoch=epoch, first=1))
    assert all((a[0] == b[0]).all() for a, b in zip(parts[1:], resumed, strict=True))


def test_a_text_too_short_for_a_batch_says_how_long_it_must_be() -> None:
    with pytest.raises(DataError, match=r"has 20 tokens, .* need at least 41"):
        SequenceBatches(np.arange(20), 4, 8)
    with pytest.raises(DataError):
        SequenceBatches(np.arange(40), 4, 8)
    assert SequenceBatches(np.arange(41), 4, 8).steps == 1


def test_counts_do_not_depend_on_the_block() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 1000).astype(np.uint16)
    assert (count_tokens(tokens, 60, block=7) == np.bincount(tokens, minlength=60)).all()
