"""Persistent adaptation: the softmax layer as the stream has slowly changed it (adaptation/slow_weights.py)."""

from torch import Tensor

from mbpa_lm.adaptation.problem import pick
from mbpa_lm.experts.base import Chunk, Expert


class PersistentExpert(Expert):
    """The softmax of the slowly adapted layer."""

    name = "persistent"
    needs_slow_weights = True

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        assert chunk.slow is not None
        return chunk.slow.log_probabilities

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        assert chunk.slow is not None
        return pick(chunk.slow.log_probabilities, targets)
