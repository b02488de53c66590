"""What a row of a batch reads: each position asks the memory, is adapted, and is remembered once the token after it is known.

The last position of a call waits for the first token of the next one. So a text that is read token by token, as generation
does it, leaves the same entries and gets the same predictions as one that is read at once.

Dimensions: `n` positions of a row in a call, `k` of which logits are wanted, `V` vocabulary, `d` hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mbpa_lm.adaptation.likely_words import likely_words_of_logits
from mbpa_lm.integrations.memory import Memory
from mbpa_lm.memory.base import Entries

NUMBERS_AT_ONCE = 1 << 24
"""Of logits that are worked on at once."""


@dataclass(frozen=True)
class Piece:
    """Some positions of a row that were read just now, without padding."""

    tokens_n: Tensor  # int64
    keys_nd: Tensor  # hidden states as the output layer takes them
    stored_n: Tensor  # bool: which are to be remembered, once the token after them is known
    logits_kV: Tensor  # of the positions wanted, to be adapted in place
    wanted_k: Tensor  # which those are, ascending


@dataclass(frozen=True)
class _Part:
    """Consecutive positions of a piece with what they leave behind."""

    entries: Entries  # the value of the piece's last position is not known; of the others nothing but keys, if none is stored
    stored: Tensor  # bool; the piece's last position is not, it waits
    begin: int


class RowReader:
    """One row of a batch, from call to call."""

    def __init__(self, memory: Memory, row: int) -> None:
        self._memory, self._row = memory, row
        self._waiting: Entries | None = None  # the last position that was read, whose value is not known yet

    def begin(self) -> None:
        """Begin a new text: the last position of the one before will never know its value."""
        self._waiting = None
        if self._memory.rows == "own":
            self._memory.forget(self._row)

    def end(self, token_1: Tensor) -> None:
        """Take the token (1,) that follows the last position, without reading it."""
        if self._waiting is not None:
            self._memory.window(self._row).write(replace(self._waiting, values=token_1))
            self._waiting = None

    def read(self, piece: Piece) -> None:
        """Adapt the logits of the positions wanted, in place, and remember what is to be remembered."""
        if len(piece.tokens_n):
            self.end(piece.tokens_n[:1])
        if not bool(piece.stored_n.any()):  # then the others matter to nobody
            every = torch.arange(len(piece.wanted_k), device=piece.wanted_k.device)
            chosen = (piece.tokens_n[piece.wanted_k], piece.keys_nd[piece.wanted_k], piece.stored_n[piece.wanted_k])
            piece = Piece(*chosen, piece.logits_kV, every)
        first = int(piece.wanted_k[0]) if len(piece.wanted_k) else len(piece.tokens_n)
        for part in self._parts(piece, 0, first, are_wanted=False):
            self._memory.window(self._row).write(part.entries.rows(part.stored))
        are_wanted = len(piece.tokens_n) - first == len(piece.wanted_k)
        for part in self._parts(piece, first, len(piece.tokens_n), are_wanted):
            self._adapt(piece, part)

    def _parts(self, piece: Piece, begin: int, end: int, are_wanted: bool) -> Iterator[_Part]:
        """Cut positions [begin, end) into parts; if their logits are wanted, all of them are, and are there."""
        layer = self._memory.language_model.output_layer()
        at_once = max(1, NUMBERS_AT_ONCE // len(layer.weight))
        for first in range(begin, end, at_once):
            last = min(first + at_once, end)
            keys, stored, values = piece.keys_nd[first:last], piece.stored_n[first:last], piece.tokens_n[first + 1 : last + 1]
            is_last = last == len(piece.tokens_n)
            if is_last:
                values = torch.cat([values, values.new_zeros(1)])
            if bool(stored.any()):
                logits = piece.logits_kV[first - begin : last - begin] if are_wanted else layer.logits(keys)
                count = self._memory.config.likely_words
                words, probabilities, log_partitions = likely_words_of_logits(logits, count)
                entries = Entries(keys, values, log_partitions, words, probabilities)
            else:
                entries = self._memory.only_keys(keys, values)
            if is_last:
                self._waiting = entries.rows(slice(-1, None)) if bool(stored[-1]) else None
                stored = torch.cat([stored[:-1], stored.new_zeros(1)])
            yield _Part(entries, stored, first)

    def _adapt(self, piece: Piece, part: _Part) -> None:
        """Change the logits of a part in place."""
        memory, entries = self._memory, part.entries
        found = memory.searched(self._row).read_and_write(entries, memory.neighbours, stored=part.stored)
        end = part.begin + len(entries.values)
        here_k = (piece.wanted_k >= part.begin) & (piece.wanted_k < end)
        rows = piece.wanted_k[here_k] - part.begin
        if len(rows) == len(entries.values):
            first = int(here_k.nonzero()[0, 0])
            memory.expert.add_to_logits(piece.logits_kV[first : first + len(rows)], entries.keys, found)
        elif len(rows):
            logits = piece.logits_kV[here_k]
            memory.expert.add_to_logits(logits, entries.keys[rows], found.of(rows))
            piece.logits_kV[here_k] = logits
