"""Text to token ids, one file's worth of rules for each kind: word level, SentencePiece, any Hugging Face tokenizer.

Every tokenizer says where in the text each token ends, so that a loss can be given per character and per word
and tokenizers can be compared. All are saved as files that execute nothing.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mbpa_lm.config import TokenizerConfig
from mbpa_lm.data.pieces import Piece
from mbpa_lm.errors import CheckpointError, ConfigError, DataError, reason
from mbpa_lm.system.durable import read_json

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
DEFAULT_SENTENCEPIECE_SIZE = 8000
WORDS_FILE = "vocabulary.json"
SENTENCEPIECE_FILE = "sentencepiece.model"
HUGGINGFACE_FOLDER = "huggingface"


class Encoded(NamedTuple):
    """Token ids of a text, and the character offset at which each token ends."""

    ids: np.ndarray  # (n,) int64
    ends: np.ndarray  # (n,) int64, never decreasing, the last is the text's length


class Tokenizer(Protocol):
    """Text to ids and back."""

    kind: str
    vocabulary_size: int
    unknown: int | None  # the token that stands for every word that the vocabulary does not know

    def encode(self, text: str) -> Encoded:
        """Encode a piece of a document (`pieces.Piece`)."""
        ...

    def token(self, index: int) -> str:
        """Return the readable form of one token."""
        ...

    def fingerprint(self) -> str:
        """Return a hash that is the same for tokenizers that encode alike."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into an existing folder."""
        ...


class WordTokenizer:
    """Words split at white space and `<eos>` at each line end, as published results on PTB and WikiText count them."""

    kind = "word"

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._ids = {word: index for index, word in enumerate(words)}
        if len(self._ids) != len(words) or UNKNOWN not in self._ids or END_OF_LINE not in self._ids:
            raise DataError(f"a word vocabulary needs distinct words with {UNKNOWN} and {END_OF_LINE} among them")
        self.vocabulary_size = len(words)
        self.unknown: int | None = self._ids[UNKNOWN]

    @classmethod
    def train(cls, pieces: Iterator[Piece], min_count: int, limit: int) -> "WordTokenizer":
        """Collect the words of the training text, the most frequent first; at most `limit` of them unless that is 0."""
        counts: Counter[str] = Counter()
        for piece in pieces:
            counts.update(_words(piece.text))
        kept = [word for word, count in counts.most_common() if count >= min_count or word == END_OF_LINE]
        kept = [UNKNOWN, *(word for word in kept if word != UNKNOWN)]
        if limit:
            kept = kept[:limit] if END_OF_LINE in kept[:limit] else [*kept[: limit - 1], END_OF_LINE]
        return cls(kept)

    def encode(self, text: str) -> Encoded:
        find = self._ids.get
        ids = np.array([find(word, self.unknown) for word in _words(text)], dtype=np.int64)
        return Encoded(ids, _word_ends(text))

    def token(self, index: int) -> str:
        return self._words[index]

    def fingerprint(self) -> str:
        return _hash(self.kind, json.dumps(self._words).encode())

    def save(self, folder: Path) -> None:
        (folder / WORDS_FILE).write_text(json.dumps(self._words, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "WordTokenizer":
        words = read_json(folder / WORDS_FILE)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CheckpointError(f"{folder / WORDS_FILE} is not a list of words")
        return cls(words)


class SentencePieceTokenizer:
    """Subwords of the SentencePiece unigram model with byte fallback, one `</s>` a line end; no character is lost."""

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.load_from_serialized_proto(model)  # the constructor takes an empty model without a word
        self.vocabulary_size = self._processor.get_piece_size()
        self.unknown: int | None = self._processor.unk_id()

    @classmethod
    def train(cls, pieces: Iterator[Piece], size: int) -> "SentencePieceTokenizer":
        """Train on the pieces' lines, a sample of at most a million of them; raises DataError when `size` does not fit."""
        import io

        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for piece in pieces for line in piece.text.split("\n") if line),
                model_writer=model,
                vocab_size=size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                input_sentence_size=1_000_000,
                shuffle_input_sentence=True,
                bos_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(f"SentencePiece cannot make {size} tokens of this text: {_bound(str(error))}") from None
        return cls(model.getvalue())

    def encode(self, text: str) -> Encoded:
        ids: list[int] = []
        ends: list[int] = []
        offset = 0
        lines = text.split("\n")
        for number, line in enumerate(lines, start=1):
            pieces = self._processor.encode(line, out_type="offset_mapping")
            ids += pieces["ids"]
            ends += [offset + end for _, end in pieces["offsets"]]
            if number == len(lines):  # nothing, or the part of a very long line
                break
            offset += len(line) + 1
            ids.append(self._processor.eos_id())
            ends.append(offset)
        return Encoded(np.array(ids, dtype=np.int64), np.array(ends, dtype=np.int64))

    def token(self, index: int) -> str:
        return str(self._processor.id_to_piece(index))

    def fingerprint(self) -> str:
        return _hash(self.kind, self._model)

    def save(self, folder: Path) -> None:
        (folder / SENTENCEPIECE_FILE).write_bytes(self._model)

    @classmethod
    def load(cls, folder: Path) -> "SentencePieceTokenizer":
        return cls((folder / SENTENCEPIECE_FILE).read_bytes())


class HuggingFaceTokenizer:
    """Any fast tokenizer of the transformers library; a document's text is encoded as it stands, line ends included."""

    kind = "huggingface"

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(f"tokenizer.name {tokenizer.name_or_path!r} has no fast version, which says where tokens end")
        self._tokenizer = tokenizer
        self.vocabulary_size = len(tokenizer)
        unknown = tokenizer.unk_token_id  # which some share with the end of a text
        self.unknown: int | None = None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id) else unknown

    @classmethod
    def load(cls, name: str, key: str = "tokenizer.name") -> "HuggingFaceTokenizer":
        """Load a tokenizer from the hub or a folder; raises ConfigError, naming the key that named it, where there is none."""
        from transformers import AutoTokenizer

        try:
            loaded = cls(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
            if not len(loaded.encode("a word").ids):
                raise ConfigError(f"{key} {name!r} has no tokenizer that knows any text; put the model's own beside it")
            return loaded
        except ConfigError:
            raise
        except Exception as error:  # each file and class has its own ways to be damaged
            raise ConfigError(f"{key} {name!r}: its tokenizer could not be loaded: {reason(error)}") from None

    def encode(self, text: str) -> Encoded:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = np.array([end for _, end in encoding["offset_mapping"]], dtype=np.int64)
        ends = np.maximum.accumulate(ends) if len(ends) else ends
        if len(ends):
            ends[-1] = len(text)  # white space at the end that the tokenizer drops
        return Encoded(np.array(encoding["input_ids"], dtype=np.int64), ends)

    def token(self, index: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(index))

    def fingerprint(self) -> str:
        rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
        rules |= {"padding": None, "truncation": None}  # left there by the last call
        return _hash(self.kind, json.dumps(rules, ensure_ascii=False, separators=(",", ":")).encode())

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder / HUGGINGFACE_FOLDER)


def make_tokenizer(config: TokenizerConfig, training_pieces: Iterator[Piece]) -> Tokenizer:
    """Make the tokenizer that the configuration names, from the training text where it is learnt."""
    if config.kind == "word":
        return WordTokenizer.train(training_pieces, config.min_count, config.vocabulary_size)
    if config.kind == "sentencepiece":
        return SentencePieceTokenizer.train(training_pieces, config.vocabulary_size or DEFAULT_SENTENCEPIECE_SIZE)
    assert config.name is not None  # TokenizerConfig has checked it
    return HuggingFaceTokenizer.load(config.name)


def load_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """Load a tokenizer that `save` wrote; raises CheckpointError where its files are missing or damaged."""
    strange = [path for path in folder.rglob("*") if not path.is_file() and not path.is_dir()]
    if strange:  # a pipe or a device may never end
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {strange[0]} is no regular file")
    try:
        if kind == "word":
            return WordTokenizer.load(folder)
        if kind == "sentencepiece":
            return SentencePieceTokenizer.load(folder)
        if kind == "huggingface":
            return HuggingFaceTokenizer.load(str(folder / HUGGINGFACE_FOLDER))
    except (OSError, ValueError, RuntimeError, DataError, ConfigError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from None
    raise CheckpointError(f"{folder} holds a tokenizer of the unknown kind {kind!r}")


def words_up_to(text: str, ends: np.ndarray) -> np.ndarray:
    """Count the words begun, and the lines ended, before each character offset in `ends`.

    A line end counts as one word, so that per-word figures of every tokenizer use the word level's count.
    """
    space, newline = _space_and_newline(text)
    starts = ~space & np.concatenate(([True], space[:-1]))
    begun = np.concatenate(([0], np.cumsum(starts | newline)))
    words: np.ndarray = begun[ends]
    return words


def _words(text: str) -> list[str]:
    return text.replace("\n", f" {END_OF_LINE} ").split()


def _word_ends(text: str) -> np.ndarray:
    space, newline = _space_and_newline(text)
    ends = ~space & np.concatenate((space[1:], [True]))
    return np.nonzero(ends | newline)[0] + 1


_SPACES = np.zeros(0x3002, dtype=bool)  # the same characters as str.split(); the last element is for all others
_SPACES[[code for code in range(0x3001) if chr(code).isspace()]] = True


def _space_and_newline(text: str) -> tuple[np.ndarray, np.ndarray]:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return _SPACES[np.minimum(codes, len(_SPACES) - 1)], codes == ord("\n")


def _bound(message: str) -> str:
    """Return what SentencePiece says of a size that does not fit, without the places in its source."""
    for pattern, bound in ((r"value <= (\d+)", "at most"), (r"required_chars\. \d+ vs (\d+)", "at least")):
        found = re.search(pattern, message)
        if found:
            return f"tokenizer.vocabulary_size must be {bound} {found[1]}"
    return reason(RuntimeError(message))


def _hash(kind: str, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()
