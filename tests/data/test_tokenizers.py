from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbpa_lm.data.pieces import Piece
from mbpa_lm.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    words_up_to,
)
from mbpa_lm.errors import CheckpointError, ConfigError, DataError

TEXT = "the naïve cat sat on the mat\nthe café ☕ of  the cat\n\nthe end\n"


def pieces(text: str = TEXT, times: int = 1) -> Iterator[Piece]:
    for _ in range(times):
        yield Piece(text, True)


def make_huggingface(folder: Path) -> str:
    """A byte-level BPE tokenizer as a user would have it in a folder."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=trained).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["word", "sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "word":
        return WordTokenizer.train(pieces(), 1, 0)
    if request.param == "sentencepiece":
        return SentencePieceTokenizer.train(pieces(times=20), 278)
    return HuggingFaceTokenizer.load(make_huggingface(tmp_path))


def test_tokens_cover_the_text_in_order(tokenizer: Tokenizer) -> None:
    ids, ends = tokenizer.encode(TEXT)
    assert len(ids) == len(ends) > 0
    assert (np.diff(ends) >= 0).all()
    assert ends[-1] == len(TEXT)
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocabulary_size
    assert words_up_to(TEXT, ends)[-1] == 19  # 15 words and 4 line ends, whatever the tokenizer


def test_saved_and_loaded_it_encodes_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tokenizer.kind, tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.vocabulary_size == tokenizer.vocabulary_size
    assert (loaded.encode(TEXT).ids == tokenizer.encode(TEXT).ids).all()


def test_words_end_where_they_end_and_lines_are_tokens() -> None:
    tokenizer = WordTokenizer(["<unk>", "<eos>", "the", "cat"])
    ids, ends = tokenizer.encode("the  cat\n\ndog the\n")
    assert [tokenizer.token(index) for index in ids] == ["the", "cat", "<eos>", "<eos>", "<unk>", "the", "<eos>"]
    assert ends.tolist() == [3, 8, 9, 10, 13, 17, 18]


def test_rare_words_become_unknown_and_a_limit_keeps_the_line_end() -> None:
    assert WordTokenizer.train(pieces("a a a b b c\n"), 2, 0).vocabulary_size == 4  # <unk> a b <eos>
    limited = WordTokenizer.train(pieces("a a a b b c\n"), 1, 3)
    assert [limited.token(index) for index in range(3)] == ["<unk>", "a", "<eos>"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_word_tokens_are_those_of_split(text: str) -> None:
    text += "\n"
    words = text.replace("\n", " <eos> ").split()
    tokenizer = WordTokenizer(list(dict.fromkeys(["<unk>", "<eos>", *words])))
    ids, ends = tokenizer.encode(text)
    assert [tokenizer.token(index) for index in ids] == words
    begins = [0, *ends[:-1]]
    for word, begin, end in zip(words, begins, ends, strict=True):
        assert text[begin:end].strip() == ("" if word == "<eos>" and text[end - 1] == "\n" else word)
    assert words_up_to(text, ends)[-1] == len(words)


def test_sentencepiece_loses_no_character() -> None:
    tokenizer = SentencePieceTokenizer.train(pieces(times=20), 278)
    text = "the  ☃ snowman\n"  # a character that it was not trained on, and two spaces
    ids, ends = tokenizer.encode(text)
    back = tokenizer._processor.decode([int(index) for index in ids[:-1]])
    assert back == text[:-1]
    assert ends[-1] == len(text)


def test_sentencepiece_reads_a_line_that_comes_in_parts() -> None:
    tokenizer = SentencePieceTokenizer.train(pieces(times=20), 278)
    parts = [tokenizer.encode(part) for part in ("the cat sat ", "on the mat\n")]
    ids = [int(index) for part in parts for index in part.ids]
    assert ids[-1] == tokenizer._processor.eos_id()
    assert ids.count(tokenizer._processor.eos_id()) == 1
    assert tokenizer._processor.decode(ids[:-1]) == "the cat sat on the mat"
    assert [part.ends[-1] for part in parts] == [len("the cat sat "), len("on the mat\n")]


@pytest.mark.parametrize("size", [10, 100_000])
def test_sentencepiece_says_which_sizes_fit(size: int) -> None:
    with pytest.raises(DataError, match=f"SentencePiece cannot make {size} tokens of this text: .*"):
        SentencePieceTokenizer.train(pieces(times=20), size)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.name '.*nowhere': its tokenizer could not be loaded"):
        HuggingFaceTokenizer.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", ["", "[1, 2]", '["a", "a", "<unk>", "<eos>"]', '["a"]', "{}"])
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(CheckpointError):
        load_tokenizer("word", tmp_path)
