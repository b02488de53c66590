"""Where text comes from: every corpus is a few splits, each a sequence of pieces of text read once, in order.

The sources themselves are in text_files.py, hub.py and builtin.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from mbpa_lm.config import DataConfig
from mbpa_lm.data.builtin import BuiltinCorpus
from mbpa_lm.data.hub import HubCorpus
from mbpa_lm.data.pieces import Piece
from mbpa_lm.data.text_files import SplitFiles, open_text

WIKITEXT_TITLE = r" = [^=\n]+ = "


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
