"""An entry as a row of a Milvus collection, and rows as entries.

Dimensions: `N` entries, `c` likely words, `d` hidden size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.entry_files import STORED_AS
from mbpa_lm.memory.datastore.manifest import Layout

POSITION, KEY, VALUE, DOCUMENT, LOG_PARTITION = "position", "key", "value", "document", "log_partition"
LIKELY_WORDS, LIKELY_PROBABILITIES = "likely_words", "likely_probabilities"
Row = dict[str, Any]


def as_stored(entries: Entries, layout: Layout) -> Entries:
    """Return entries as a memory of this layout gives them back, on the CPU.

    Raises ValueError where they have another number of likely words than the layout, unless that is 0.
    """
    if layout.likely_words not in (0, entries.likely_words.shape[-1]):
        raise ValueError(f"entries with {entries.likely_words.shape[-1]} likely words, {layout.likely_words} are stored")
    return Entries(
        entries.keys.detach().to("cpu", STORED_AS[layout.key_type]),
        entries.values.detach().to("cpu", torch.int64),
        entries.log_partitions.detach().to("cpu", torch.float32),
        entries.likely_words[..., : layout.likely_words].detach().to("cpu", torch.int32),
        entries.likely_probabilities[..., : layout.likely_words].detach().to("cpu", torch.float16),
    )


def joined(parts: Sequence[Entries]) -> Entries:
    """Return entries of several parts as one, in their order."""
    return Entries(*(torch.cat(column) for column in zip(*(part.tensors() for part in parts), strict=True)))


def no_entries(layout: Layout, count: int = 0) -> Entries:
    """Return entries of zeros in the types of the layout."""
    return Entries(
        torch.zeros(count, layout.hidden_size, dtype=STORED_AS[layout.key_type]),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count),
        torch.zeros(count, layout.likely_words, dtype=torch.int32),
        torch.zeros(count, layout.likely_words, dtype=torch.float16),
    )


def to_rows(first: int, entries: Entries, documents_N: Tensor, half: bool) -> list[Row]:
    """Return entries, as they are stored, as rows; `half`: keys lie in 16 bits in the collection."""
    keys = (entries.keys.half() if half else entries.keys.float()).numpy()
    columns: dict[str, Sequence[Any]] = {
        POSITION: range(first, first + len(keys)),
        KEY: list(keys),
        VALUE: entries.values.tolist(),
        DOCUMENT: documents_N.tolist(),
        LOG_PARTITION: entries.log_partitions.tolist(),
    }
    if entries.likely_words.shape[1]:
        columns[LIKELY_WORDS] = entries.likely_words.tolist()
        columns[LIKELY_PROBABILITIES] = entries.likely_probabilities.float().tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def from_rows(rows: Sequence[Row], layout: Layout) -> Entries:
    """Return rows as entries in the types of the layout."""
    if not rows:
        return no_entries(layout)
    keys_Nd = np.stack([_key(row[KEY]) for row in rows])

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([list(row[name]) for row in rows], dtype=dtype)

    empty = no_entries(layout, len(rows))
    return Entries(
        torch.from_numpy(keys_Nd).to(STORED_AS[layout.key_type]),
        torch.tensor([row[VALUE] for row in rows]),
        torch.tensor([row[LOG_PARTITION] for row in rows], dtype=torch.float32),
        column(LIKELY_WORDS, torch.int32) if layout.likely_words else empty.likely_words,
        column(LIKELY_PROBABILITIES, torch.float16) if layout.likely_words else empty.likely_probabilities,
    )


def output_fields(layout: Layout) -> list[str]:
    """Return the fields that `from_rows` reads."""
    return [KEY, VALUE, LOG_PARTITION, *((LIKELY_WORDS, LIKELY_PROBABILITIES) if layout.likely_words else ())]


def _key(stored: Any) -> np.ndarray:
    """Return a key: 16-bit ones come as bytes, others as numbers."""
    return np.frombuffer(stored, dtype="<f2") if isinstance(stored, bytes) else np.asarray(stored, dtype=np.float32)
