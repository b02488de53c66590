"""No number that is no probability gets into a result: what experts give is looked at before it is used.

Dimensions: `C` positions, `V` vocabulary.
"""

from collections import Counter
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.errors import NumericalError
from mbpa_lm.experts.base import Chunk

TOLERANCE = 1e-5
"""By how much a log-probability may be above zero, and the sum of a distribution off one, from rounding alone."""


class Guard:
    """Stops at a violation, or, with `falls_back`, takes the base model's prediction there and counts it."""

    def __init__(self, falls_back: bool = False, inspected: Collection[int] = ()) -> None:
        """At the `inspected` positions every expert's whole distribution is made and looked at too."""
        self.falls_back = falls_back
        self.inspected = sorted(inspected)
        self.fallen_back: Counter[str] = Counter()

    def may_fall_back(self, expert: str) -> bool:
        """Say whether an expert's failure is not to stop the pass: the base model's always is."""
        return self.falls_back and expert != "base"

    def checked(
        self, expert: str, own_C: np.ndarray, alone_C: np.ndarray, base_C: np.ndarray, chunk: Chunk, targets: Tensor, first: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probabilities of the targets, an expert's own and where it predicts alone, at positions from `first`.

        Its own may be minus infinity, for a word that it knows nothing of. Raises NumericalError at a violation.
        """
        right_C = np.isfinite(alone_C) & (alone_C <= TOLERANCE) & (own_C <= TOLERANCE)  # NaN is neither
        if not right_C.all():
            index = int(np.argmin(right_C))
            if not self.may_fall_back(expert):
                value = alone_C[index] if own_C[index] <= TOLERANCE else own_C[index]
                raise NumericalError(
                    f"expert {expert} gave a log-probability of {value:g} at position {first + index}: "
                    f"{_inputs(chunk, targets, index)}; --evaluation.on_error base goes on with the base model there"
                )
            self.fallen_back[expert] += int((~right_C).sum())
            own_C, alone_C = np.where(right_C, own_C, base_C), np.where(right_C, alone_C, base_C)
        return np.minimum(own_C, 0.0), np.minimum(alone_C, 0.0)

    def positions_to_inspect(self, first: int, count: int) -> list[int]:
        """Return which of `count` positions from `first` are inspected, counted from `first`."""
        return [position - first for position in self.inspected if first <= position < first + count]

    @staticmethod
    def check_distribution(expert: str, log_probabilities_V: Tensor, position: int) -> None:
        """Raise NumericalError where a distribution has a probability above one or no number, or does not sum to one."""
        if not bool((log_probabilities_V <= TOLERANCE).all()):
            raise NumericalError(
                f"expert {expert} gave a word the log-probability {float(log_probabilities_V.max()):g} at position {position}"
            )
        total = float(log_probabilities_V.double().exp().sum())
        if abs(total - 1) > TOLERANCE:
            raise NumericalError(f"the distribution of expert {expert} at position {position} sums to {total:.8f}, not to one")


def _inputs(chunk: Chunk, targets: Tensor, index: int) -> str:
    length = float(torch.linalg.vector_norm(chunk.hidden_states[index].float()))
    text = f"token {int(targets[index])} after token {int(chunk.inputs[index])}, a hidden state of length {length:.4g}"
    if chunk.neighbours is not None and chunk.neighbours.squared_distances.shape[1]:
        text += f", the nearest entry at squared distance {float(chunk.neighbours.squared_distances[index, 0]):.4g}"
    return text


def check_mixture(name: str, losses: np.ndarray) -> None:
    """Raise NumericalError where a mixture of experts gave a token no probability, or one above one."""
    right = np.isfinite(losses) & (losses >= -TOLERANCE)
    if not right.all():
        position = int(np.argmin(right))
        raise NumericalError(f"the mixture {name} gave a log-probability of {-losses[position]:g} at position {position}")
