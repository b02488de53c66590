"""Where text comes from: every corpus is a few splits, each a sequence of pieces of text read once, in order.

A piece is up to about a mebibyte of whole lines and says whether it starts a document, so that a corpus of any
size passes through bounded memory. The sources themselves are in text_files.py, hub.py and builtin.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from mbpa_lm.config import DataConfig

SPLITS = ("train", "valid", "test")
WIKITEXT_TITLE = r" = [^=\n]+ = "


class Piece(NamedTuple):
    """Some lines of a document, each ended by a newline; of a very long line, a part that ends after a space."""

    text: str
    starts_document: bool


class Corpus(Protocol):
    """A named text with splits."""

    name: str

    def fingerprint(self, split: str) -> str:
        """Return a hash that changes when the split's text does."""
        ...

    def pieces(self, split: str) -> Iterator[Piece]:
        """Read a split from its beginning; raises DataError where it is missing or is not text."""
        ...


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus that the configuration names; raises DataError where its files are not there."""
    from mbpa_lm.data.builtin import BuiltinCorpus
    from mbpa_lm.data.hub import HubCorpus
    from mbpa_lm.data.text_files import SplitFiles, open_text

    if config.corpus == "builtin":
        return BuiltinCorpus(config.valid_fraction, config.test_fraction)
    wikitext = config.corpus.startswith("wikitext")
    pattern = config.document_pattern or (WIKITEXT_TITLE if wikitext else None)
    if config.corpus == "text":
        assert config.path is not None  # DataConfig has checked it
        return open_text(Path(config.path), pattern, config.valid_fraction, config.test_fraction)
    if config.path:
        return SplitFiles(Path(config.path), pattern, config.corpus)
    return HubCorpus(config.corpus, pattern)


def split_documents(pieces: Iterator[Piece], pattern: str | None) -> Iterator[Piece]:
    """Cut pieces before every line that matches `pattern` as a whole.

    White space before the first such line belongs to its document: a file that opens with a blank line does not
    get an empty document.
    """
    if pattern is None:
        yield from pieces
        return
    title = re.compile(pattern)
    only_space_so_far = True
    for text, starts_document in pieces:
        starts = _line_starts(text, title)
        if only_space_so_far and starts and not text[: starts[0]].strip():
            starts = starts[1:]
        only_space_so_far = only_space_so_far and not text.strip()
        bounds = [0, *(start for start in starts if start > 0), len(text)]
        for index, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            yield Piece(text[begin:end], starts_document if index == 0 and 0 not in starts else True)


def _line_starts(text: str, title: re.Pattern[str]) -> list[int]:
    starts, offset = [], 0
    for line in text.split("\n"):
        if offset < len(text) and title.fullmatch(line):
            starts.append(offset)
        offset += len(line) + 1
    return starts
