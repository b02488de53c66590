"""What an expert sees of the stream, and what it must return.

Dimensions: `C` positions of a chunk, `K` neighbours, `V` vocabulary, `d` hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mbpa_lm.memory.base import Neighbours


@dataclass(frozen=True)
class Chunk:
    """Some consecutive positions of the stream, with everything that their predictions may depend on."""

    hidden_states: Tensor  # (C, d)
    base_log_probabilities: Tensor  # (C, V)
    neighbours: Neighbours | None  # None where no expert asked for them


class Expert(Protocol):
    """One way to predict the next token."""

    name: str
    needs_neighbours: bool

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        """Return the log-probabilities (C, V) of the next token at each position, as generation needs them."""
        ...

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        """Return the log-probabilities (C,) of given tokens (C,), as evaluation needs them."""
        ...
