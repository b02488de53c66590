"""Token files: a split encoded once, memory-mapped ever after; and the pieces in which training reads them.

A token file is a folder: `tokens.bin` (little-endian unsigned integers as wide as the vocabulary needs),
`characters.bin` and `words.bin` (uint16: characters and words that each token covers), and `manifest.json` with
counts, the first token of every document, and hashes of the arrays and of itself. The folder's name carries a hash of
source, tokenizer and format, so a changed source or setting never meets an old file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mbpa_lm.data.corpora import Corpus
from mbpa_lm.data.tokenizers import Tokenizer, words_up_to
from mbpa_lm.errors import DAMAGES, DataError, reason
from mbpa_lm.system.durable import file_hash, read_json, sealed, unsealed

FORMAT = 2
ARRAYS = ("tokens", "characters", "words")
WIDEST = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class TokenStream:
    """A split as token ids, read from disk as it is used."""

    name: str
    tokens: np.ndarray  # (n,) unsigned integers
    characters: np.ndarray  # (n,) uint16, characters of text that a token covers
    words: np.ndarray  # (n,) uint16, words and line ends that begin in a token
    document_starts: np.ndarray  # (documents,) int64

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> "TokenStream":
        """Return the stream of the first `count` tokens."""
        return self._part(0, count)

    def documents(self) -> list["TokenStream"]:
        """Return each document as a stream; one of a single token, in which nothing can be predicted, is left out."""
        bounds = [*self.document_starts.tolist(), len(self)]
        if bounds[0] > 0:  # text before the first title
            bounds.insert(0, 0)
        return [self._part(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False) if end - begin > 1]

    def _part(self, begin: int, end: int) -> "TokenStream":
        starts = self.document_starts[(self.document_starts >= begin) & (self.document_starts < end)] - begin
        part = slice(begin, end)
        return TokenStream(self.name, self.tokens[part], self.characters[part], self.words[part], starts)


def open_stream(
    corpus: Corpus,
    split: str,
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> TokenStream:
    """Open the token file of a split, building it first where there is none.

    `on_progress` is told the number of tokens so far. Raises DataError for text that cannot be read, for a disk
    that cannot be written, and for a damaged token file.
    """
    identity = "\n".join([str(FORMAT), corpus.fingerprint(split), tokenizer.fingerprint()])
    path = folder / f"{corpus.name}-{split}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not (path / "manifest.json").is_file():
        _build(corpus, split, tokenizer, path, on_progress)
    return _read(path, f"{corpus.name} {split}", tokenizer.vocabulary_size)


def _build(corpus: Corpus, split: str, tokenizer: Tokenizer, path: Path, on_progress: Callable[[int], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise DataError(f"data.token_folder {path.parent} cannot be written: {error.strerror}") from None
    try:
        manifest = _encode(corpus, split, tokenizer, temporary, on_progress)
        (temporary / "manifest.json").write_text(json.dumps(sealed(manifest)))
        try:
            os.replace(temporary, path)
        except OSError:
            if not (path / "manifest.json").is_file():  # else another process has just built the same file
                raise
    except OSError as error:
        raise DataError(f"token file {path} could not be written: {error.strerror}; free some space") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(
    corpus: Corpus, split: str, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    dtype = np.uint16 if tokenizer.vocabulary_size <= WIDEST + 1 else np.uint32
    starts: list[int] = []
    count = 0
    files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
    try:
        for text, starts_document in corpus.pieces(split):
            ids, ends = tokenizer.encode(text)
            if starts_document:
                starts.append(count)
            covered = {"characters": np.diff(ends, prepend=0), "words": np.diff(words_up_to(text, ends), prepend=0)}
            if len(ids) and max(covered["characters"].max(), covered["words"].max()) > WIDEST:
                raise DataError(f"{corpus.name} {split} has a word of more than {WIDEST} characters; is it text?")
            files["tokens"].write(ids.astype(dtype).tobytes())
            for name, values in covered.items():
                files[name].write(values.astype(np.uint16).tobytes())
            count += len(ids)
            on_progress(count)
    finally:
        for file in files.values():
            file.close()
    if count < 2:
        raise DataError(f"{corpus.name} {split} has {count} tokens; a stream needs at least 2")
    hashes = {name: file_hash(folder / f"{name}.bin") for name in ARRAYS}
    return {"format": FORMAT, "tokens": count, "dtype": np.dtype(dtype).name, "document_starts": starts, "arrays": hashes}


def _read(path: Path, name: str, vocabulary_size: int) -> TokenStream:
    try:
        manifest = unsealed(read_json(path / "manifest.json"))
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"its tokens are said to be {manifest['dtype']!r}")
        dtypes = {"tokens": np.dtype(manifest["dtype"]), "characters": np.dtype("u2"), "words": np.dtype("u2")}
        if not all((path / f"{array}.bin").is_file() for array in ARRAYS):
            raise ValueError("it lacks a file")
        arrays = {array: np.memmap(path / f"{array}.bin", dtype=dtypes[array], mode="r") for array in ARRAYS}
        starts = np.array(manifest["document_starts"], dtype=np.int64)
        if starts.ndim != 1 or (np.diff(starts, prepend=-1, append=manifest["tokens"]) <= 0).any():
            raise ValueError("its documents do not begin one after another")
        if {len(array) for array in arrays.values()} != {manifest["tokens"]}:
            raise ValueError("its arrays have other lengths than its manifest says")
        for array in ARRAYS:
            if file_hash(path / f"{array}.bin") != manifest["arrays"][array]:
                raise ValueError(f"{array}.bin is not what was written")
    except DAMAGES as error:
        raise DataError(f"token file {path} is damaged ({reason(error)}); delete it and it will be built again") from None
    largest = int(arrays["tokens"].max())
    if largest >= vocabulary_size:
        raise DataError(
            f"token file {path} holds token id {largest}, outside the vocabulary of {vocabulary_size}; "
            f"delete it and it will be built again"
        )
    return TokenStream(name, arrays["tokens"], arrays["characters"], arrays["words"], starts)


def count_tokens(tokens: np.ndarray, vocabulary_size: int, block: int = 1 << 20) -> np.ndarray:
    """Count how often each token id occurs, in bounded memory. Returns (vocabulary_size,) int64."""
    counts = np.zeros(vocabulary_size, dtype=np.int64)
    for start in range(0, len(tokens), block):
        counts += np.bincount(tokens[start : start + block], minlength=vocabulary_size)
    return counts


@dataclass(frozen=True)
class SequenceBatches:
    """A stream cut into `batch_size` rows that are read side by side, `sequence_length` tokens at a time.

    Row b continues from one batch to the next, so a recurrent state can be carried (truncated BPTT). `epoch` shifts
    where the cuts fall, so that no word always stands at the end of a gradient's reach.
    """

    tokens: np.ndarray
    batch_size: int
    sequence_length: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            needed = self.batch_size * self.sequence_length + self.sequence_length + 1
            raise DataError(
                f"the text has {len(self.tokens):,} tokens, but training.batch_size {self.batch_size} and "
                f"training.sequence_length {self.sequence_length} need at least {needed:,}; make one of them smaller"
            )

    @property
    def steps(self) -> int:
        """Batches in an epoch, the same in every epoch."""
        return (len(self.tokens) - 1 - self.sequence_length) // self.batch_size // self.sequence_length

    def batches(self, seed: int, epoch: int, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (inputs, targets), each (batch_size, sequence_length) int64, from batch `first` of an epoch on."""
        shift = int(np.random.default_rng((seed, epoch)).integers(self.sequence_length))
        row_length = (len(self.tokens) - 1 - shift) // self.batch_size
        for step in range(first, self.steps):
            begins = shift + step * self.sequence_length + row_length * np.arange(self.batch_size)
            rows = np.stack([self.tokens[begin : begin + self.sequence_length + 1] for begin in begins])
            yield rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
