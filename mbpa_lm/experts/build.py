"""The experts that a configuration asks for."""

from mbpa_lm.config import Config
from mbpa_lm.experts.base import Expert
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.experts.persistent import PersistentExpert
from mbpa_lm.models.base import OutputLayer


def build_experts(config: Config, layer: OutputLayer) -> list[Expert]:
    """Return the configured experts in the order in which config.EXPERTS names them, the base model always first."""
    wanted = config.evaluation.experts
    experts: list[Expert] = [BaseModelExpert()]
    if "mbpa" in wanted:
        experts.append(MbpaExpert(layer, config.adaptation, config.memory.neighbours))
    if "persistent" in wanted:
        experts.append(PersistentExpert())
    if "mbpa+persistent" in wanted:
        experts.append(MbpaExpert(layer, config.adaptation, config.memory.neighbours, from_slow_weights=True))
    return experts
