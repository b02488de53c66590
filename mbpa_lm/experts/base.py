"""What an expert sees of the stream, and what it must return.

Dimensions: `C` positions of a chunk, `K` neighbours, `V` vocabulary, `d` hidden size.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from mbpa_lm.memory.base import Neighbours
from mbpa_lm.memory.history import Stretch


@dataclass(frozen=True)
class SlowSoftmax:
    """The slowly adapted layer and what it gives at the chunk's positions."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    log_probabilities: Tensor  # (C, V)
    log_partitions: Tensor  # (C,)


@dataclass(frozen=True)
class Chunk:
    """Some consecutive positions of the stream, with everything that their predictions may depend on."""

    inputs: Tensor  # (C,) int64, the tokens read: the prediction at each position is of the one after
    hidden_states: Tensor  # (C, d)
    base_log_probabilities: Tensor  # (C, V)
    base_log_partitions: Tensor  # (C,)
    neighbours: Neighbours | None  # None where no expert asked for them
    slow: SlowSoftmax | None = None  # None where no expert asked for it
    stretch: Stretch | None = None  # None where no expert asked for a window

    def part(self, positions: slice | Tensor) -> "Chunk":
        """Return some of the positions."""
        slow = self.slow
        if slow is not None:
            slow = replace(
                slow, log_probabilities=slow.log_probabilities[positions], log_partitions=slow.log_partitions[positions]
            )
        return replace(
            self,
            inputs=self.inputs[positions],
            hidden_states=self.hidden_states[positions],
            base_log_probabilities=self.base_log_probabilities[positions],
            base_log_partitions=self.base_log_partitions[positions],
            neighbours=None if self.neighbours is None else self.neighbours.of(positions),
            slow=slow,
            stretch=None if self.stretch is None or isinstance(positions, Tensor) else self.stretch.of(positions),
        )


class Expert(Protocol):
    """One way to predict the next token. Its distributions may give a word no probability at all: see `weight`."""

    name: str
    neighbours: int = 0
    """How many neighbours of each position it wants; 0 for none. It may be given more."""
    needs_slow_weights: bool = False
    window: int = 0
    """How many of the stream's most recent entries it wants to see; 0 for none. It may be given more."""
    learns: bool = False
    """Whether it changes with the targets that it has predicted, so that a chunk cannot be given to it twice."""
    weight: float = 1.0
    """Its share where it predicts alone; the rest is the base model's, or, where it needs them, that of the slow weights."""

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        """Return the log-probabilities (C, V) of the next token at each position, as generation needs them."""
        ...

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        """Return the log-probabilities (C,) of given tokens (C,), as evaluation needs them.

        Positions are given once, in the order of the stream; an expert may learn from the targets that it has predicted.
        """
        ...

    def details(self) -> dict[str, float]:
        """Return what else it has to report of the stream so far, by name."""
        return {}
