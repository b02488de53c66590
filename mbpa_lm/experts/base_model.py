"""The trained model as it is."""

from torch import Tensor

from mbpa_lm.adaptation.problem import pick
from mbpa_lm.experts.base import Chunk, Expert


class BaseModelExpert(Expert):
    """The base softmax, which every other expert is compared with."""

    name = "base"

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        return chunk.base_log_probabilities

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        return pick(chunk.base_log_probabilities, targets)
