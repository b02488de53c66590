"""What every memory offers: read before you write, one position of the stream after another.

Dimensions: `C` positions of a chunk, `K` neighbours, `d` hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """The entries nearest to each query, nearest first; the newer first among equals.

    Where fewer than K entries were visible, the last places are empty: distance inf, position -1, zeros elsewhere.
    """

    keys: Tensor  # (C, K, d) hidden states
    values: Tensor  # (C, K) int64, the token that followed
    log_partitions: Tensor  # (C, K), log sum of exp of the base model's logits at the key
    squared_distances: Tensor  # (C, K), inf where empty
    positions: Tensor  # (C, K) int64, how many entries were written before this one; -1 where empty


class Memory(Protocol):
    """Entries that a stream leaves behind."""

    def __len__(self) -> int:
        """Return the number of entries that the next query would see."""
        ...

    def read_and_write(self, hidden_states: Tensor, next_tokens: Tensor, log_partitions: Tensor, count: int) -> Neighbours:
        """Answer each position's query, then store that position, in the order of the stream.

        Position i of the chunk sees what was stored before the chunk and positions 0 to i - 1 of it: the result is
        the same however the stream is cut into chunks.

        Args: hidden_states (C, d); next_tokens (C,) int64; log_partitions (C,); count: K.
        """
        ...
