"""Dynamic evaluation of the whole model as an expert (dynamic_model.py)."""

from torch import Tensor

from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.experts.dynamic_model import DynamicModel


class DynamicExpert(Expert):
    """A copy of the model that goes on learning; it reads the stream itself, and learns from each target once."""

    name = "dynamic"
    learns = True

    def __init__(self, model: DynamicModel) -> None:
        self._model = model

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        return self._model.log_probabilities(chunk.inputs)

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        return self._model.score(chunk.inputs, targets)
