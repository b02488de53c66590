"""Reading a text with a model and writing what it leaves behind into a datastore, in memory that does not grow with it.

The text is read in blocks, several side by side, each on its own after the WARM_UP tokens before it. So where a build was
interrupted it goes on with the next block, and what is stored does not depend on that. Documents are parts of one stream, as
the models of this package read them, or each is read as if there were no other, as a model of transformers meets them.

Dimensions: `B` blocks side by side, `T` tokens, `V` vocabulary, `d` hidden size.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.adaptation.likely_words import likely_words
from mbpa_lm.adaptation.problem import normalize
from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.manifest import Source
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.models.base import LanguageModel, State
from mbpa_lm.system.out_of_memory import is_out_of_memory, release_memory
from mbpa_lm.system.progress import console

BLOCK, SIDE_BY_SIDE, WARM_UP = 4096, 8, 256
LOGITS_AT_ONCE = 1 << 23
NUMBERS_AT_ONCE = 1 << 24
"""Of hidden states that wait to be written."""


class Text(NamedTuple):
    """A text to be remembered."""

    name: str
    fingerprint: str
    tokens: np.ndarray  # (n,) ids; an entry each but the last, of the text or of each document
    document_starts: np.ndarray  # (documents,), the first token of each
    apart: bool = False  # whether each document is read on its own

    def stretches(self) -> list[tuple[int, int]]:
        """Return the tokens [begin, end) of what is read without anything before it."""
        starts = self.document_starts.tolist() if self.apart else [0]
        ends = [*starts[1:], len(self.tokens)]
        return [(begin, end) for begin, end in zip(starts, ends, strict=True) if end > begin]

    @property
    def entries(self) -> int:
        """Return how many entries the text leaves behind."""
        return len(self.tokens) - len(self.stretches())


class _Block(NamedTuple):
    """Positions [begin, end) of a text that are read side by side with others, after a few before them."""

    begin: int
    end: int
    warm_up: int


@torch.no_grad()
def remember(
    store: Datastore, model: LanguageModel, text: Text, on_progress: Callable[[int], None] = lambda entries: None
) -> None:
    """Add the entries of a text to a store, or those that are missing; `on_progress` is told how many are there.

    The model must be in evaluation mode. Raises DatastoreError where another text is half read, and where the store cannot be
    written; what is there then stays, and the next call goes on from it.
    """
    source = _source(store, text)
    done = len(store) - source.first_entry
    if store.manifest.sources and source.first_entry < store.manifest.sources[-1].first_entry:
        done = source.entries  # it is not the last one, so it is whole
    limit = store.memory_limit
    waiting = min(NUMBERS_AT_ONCE, limit // 128) if limit else NUMBERS_AT_ONCE
    logits = min(LOGITS_AT_ONCE, limit // 256) if limit else LOGITS_AT_ONCE
    at_once = BLOCK * max(1, min(SIDE_BY_SIDE, waiting // (BLOCK * model.hidden_size)))
    side_by_side = SIDE_BY_SIDE
    for group in _groups(_blocks(text, done), at_once):
        found = None
        while found is None:
            try:
                found = _read_blocks(model, text.tokens, group, store.likely_words, logits, side_by_side)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or (side_by_side == 1 and logits <= model.vocabulary_size):
                    raise
                logits, side_by_side = logits // 2, max(1, side_by_side // 2)
            if found is None:
                console.print("out of memory for the model: going on with half as many positions at once")
                release_memory()
        entries = Entries(*(torch.cat(column) for column in zip(*(block.tensors() for block in found), strict=True)))
        positions = np.concatenate([np.arange(block.begin, block.end) for block in group])
        documents = np.searchsorted(text.document_starts, positions, side="right") - 1
        store.add(entries, torch.from_numpy(np.maximum(documents, 0)) + source.first_document, source)
        done += len(positions)
        on_progress(done)


def _blocks(text: Text, done: int) -> Iterator[_Block]:
    """Cut a text into blocks, leaving out those of the first `done` entries."""
    before = 0
    for first, end in text.stretches():
        for begin in range(first, end - 1, BLOCK):
            block = _Block(begin, min(begin + BLOCK, end - 1), min(begin - first, WARM_UP))
            if before >= done:
                yield block
            before += block.end - block.begin


def _groups(blocks: Iterator[_Block], entries: int) -> Iterator[list[_Block]]:
    """Put consecutive blocks together, up to so many entries, or one block."""
    group: list[_Block] = []
    for block in blocks:
        if group and sum(each.end - each.begin for each in group) + block.end - block.begin > entries:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _source(store: Datastore, text: Text) -> Source:
    """Return the record of the text in the store, a new one where it has none."""
    sources, entries = store.manifest.sources, text.entries
    for source in sources:
        if (source.fingerprint, source.entries) == (text.fingerprint, entries):
            return source
    if sources and len(store) < sources[-1].first_entry + sources[-1].entries:
        raise DatastoreError(
            f"{store.folder} holds only a part of {sources[-1].name}, its build was interrupted; go on with that text first"
        )
    return Source(text.name, text.fingerprint, len(store), store.manifest.documents, entries)


def _read_blocks(
    model: LanguageModel, tokens: np.ndarray, blocks: list[_Block], likely: int, logits: int, side_by_side: int
) -> list[Entries]:
    """Return the entries of each block; so many of one length and one warm-up are read side by side."""
    found: dict[int, Entries] = {}
    alike: dict[tuple[int, int], list[int]] = {}
    for begin, end, warm_up in blocks:
        alike.setdefault((warm_up, end - begin), []).append(begin)
    for (warm_up, length), every in alike.items():
        for begins in (every[first : first + side_by_side] for first in range(0, len(every), side_by_side)):
            rows = np.stack([tokens[begin - warm_up : begin + length + 1] for begin in begins]).astype(np.int64)
            pieces = list(_read(model, torch.from_numpy(rows), warm_up, likely, logits))
            for row, begin in enumerate(begins):
                parts = zip(*(piece.tensors() for piece in pieces), strict=True)
                found[begin] = Entries(*(torch.cat([part[row] for part in column]) for column in parts))
    return [found[block.begin] for block in blocks]


def _read(model: LanguageModel, rows_BT: Tensor, warm_up: int, likely: int, logits: int) -> Iterator[Entries]:
    """Read rows side by side, and give what the positions after the warm-up leave behind, piece by piece: (B, T, ...).

    Args: logits: how many are worked on at once.
    """
    layer = model.output_layer()
    device, count = layer.weight.device, rows_BT.shape[1] - 1
    at_once = max(1, logits // (len(rows_BT) * model.vocabulary_size))
    state: State | None = None
    begin = 0
    while begin < count:
        end = min(begin + at_once, count) if begin >= warm_up else warm_up
        output = model(rows_BT[:, begin:end].to(device), state)
        state = output.state
        if begin >= warm_up:
            base, log_partitions = normalize(layer.logits(output.hidden_states).flatten(0, 1))
            shape = output.hidden_states.shape[:2]
            words, probabilities = likely_words(base, likely)
            yield Entries(
                output.hidden_states.cpu(),
                rows_BT[:, begin + 1 : end + 1],
                log_partitions.view(shape).cpu(),
                words.view(*shape, -1).cpu(),
                probabilities.view(*shape, -1).cpu(),
            )
        begin = end
