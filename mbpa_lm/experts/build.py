"""The experts that a configuration asks for."""

from collections.abc import Callable

from mbpa_lm.config import Config
from mbpa_lm.config.checks import known
from mbpa_lm.experts.base import Expert
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.cache import CacheExpert
from mbpa_lm.experts.dynamic import DynamicExpert
from mbpa_lm.experts.dynamic_model import DynamicModel
from mbpa_lm.experts.knn import KnnExpert
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.experts.persistent import PersistentExpert
from mbpa_lm.memory.base import EntryStore
from mbpa_lm.models.base import OutputLayer


def build_experts(
    config: Config,
    layer: OutputLayer,
    knn_store: Callable[[], EntryStore],
    dynamic_model: Callable[[], DynamicModel],
) -> list[Expert]:
    """Return the configured experts in the order in which config.EXPERTS names them, the base model always first.

    The store of kNN-LM and the dynamic model are made only where an expert needs them.
    """
    wanted, cache, knn, memory = config.evaluation.experts, config.cache, config.knn, config.memory
    is_window = not memory.datastores and config.remote.address is None
    neighbours = min(memory.neighbours, memory.size) if is_window else memory.neighbours
    experts: list[Expert] = [BaseModelExpert()]
    if "mbpa" in wanted:
        experts.append(MbpaExpert(layer, config.adaptation, neighbours))
    if "persistent" in wanted:
        experts.append(PersistentExpert())
    if "mbpa+persistent" in wanted:
        experts.append(MbpaExpert(layer, config.adaptation, neighbours, from_slow_weights=True))
    if "cache" in wanted:
        thetas, weights = known("cache.thetas", cache.thetas), known("cache.weights", cache.weights)
        experts += [CacheExpert(*settings) for settings in zip(cache.windows, thetas, weights, strict=True)]
    if "knn" in wanted:
        experts.append(KnnExpert(knn_store(), knn.neighbours, known("knn.temperature", knn.temperature), knn.weight, knn.grows))
    if "dynamic" in wanted:
        experts.append(DynamicExpert(dynamic_model()))
    return experts
