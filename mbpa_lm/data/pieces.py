"""What a corpus is read as: pieces of text in order, each up to about a mebibyte of whole lines.

A piece says whether it starts a document, so that a corpus of any size passes through bounded memory.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

SPLITS = ("train", "valid", "test")


class Piece(NamedTuple):
    """Some lines of a document, each ended by a newline; of a very long line, a part that ends after a space."""

    text: str
    starts_document: bool


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
