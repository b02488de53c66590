"""Tune all experts that an evaluation runs, one after the other, then their weights in a fixed mixture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbpa_lm.checkpoints.checkpoint import Checkpoint
from mbpa_lm.checkpoints.tuned import Tuned
from mbpa_lm.config import Config
from mbpa_lm.data.streams import TokenStream
from mbpa_lm.mixing.mixture import best_weights, mix
from mbpa_lm.scoring.mixed_scores import UNIFORM, all_components
from mbpa_lm.scoring.resources import make_experts, make_knn_store
from mbpa_lm.tuning.adaptation import tune_adaptation
from mbpa_lm.tuning.passes import Validation
from mbpa_lm.tuning.rates import tune_dynamic, tune_persistent
from mbpa_lm.tuning.shares import tune_caches, tune_knn

TOKENS = 30_000
"""Validation predictions that settings are tuned on, and fewer where each costs much."""
KNN_TOKENS, PERSISTENT_TOKENS, DYNAMIC_TOKENS = 10_000, 12_000, 6_000

Settings = dict[str, dict[str, Any]]


@dataclass
class _Found:
    settings: Settings
    losses: dict[str, dict[str, float]]
    metric: list[float] | None = None


def tune(config: Config, checkpoint: Checkpoint, stream: TokenStream, earlier: Tuned | None) -> Tuned:
    """Return what is best for the configured experts on a validation stream; what is not tuned now stays as it was earlier.

    Raises DataError where the stream is too short.
    """
    validation = Validation(config, checkpoint, stream).first(TOKENS)
    found = _Found({}, {})
    wanted = config.evaluation.experts
    kinds: list[tuple[tuple[str, ...], Callable[[Validation, _Found], None]]] = [
        (("mbpa", "mbpa+persistent"), _adaptation),
        (("persistent", "mbpa+persistent"), _persistent),
        (("cache",), _caches),
        (("knn",), _knn),
        (("dynamic",), _dynamic),
    ]
    for names_of_kind, find in kinds:
        if any(name in wanted for name in names_of_kind):
            find(validation, found)
    tuned = Tuned(stream.name, found.settings, found.metric, {}, found.losses).over(earlier)
    experts = make_experts(tuned.apply(config), checkpoint)
    if len(experts) == 1:
        return tuned
    scores = replace(validation, config=tuned.apply(config)).score("weighing all experts", experts, tuned=tuned)
    names = [expert.name for expert in experts]
    components = all_components(scores, names, checkpoint.model.vocabulary_size)
    weights = best_weights(components)
    of_mixture = {
        "base": -float(scores.components["base"].mean(dtype=np.float64)),
        "tuned": -float(mix(components, weights).mean()),
    }
    return replace(
        tuned,
        weights=dict(zip([*names, UNIFORM], weights.tolist(), strict=True)),
        losses={**tuned.losses, "mixture": of_mixture},
    )


def _adaptation(validation: Validation, found: _Found) -> None:
    fitted = tune_adaptation(validation)
    found.settings |= {"adaptation": fitted.adaptation, "memory": fitted.memory}
    found.losses["mbpa"] = fitted.losses
    found.metric = fitted.metric


def _persistent(validation: Validation, found: _Found) -> None:
    rates = tune_persistent(validation.first(PERSISTENT_TOKENS))
    found.settings["persistent"] = {"rate": rates.rate, "decay": rates.decay}
    found.losses["persistent"] = rates.losses


def _caches(validation: Validation, found: _Found) -> None:
    choices = tune_caches(validation)
    found.settings["cache"] = {
        "windows": validation.config.cache.windows,
        "thetas": [choice.sharpness for choice in choices.values()],
        "weights": [choice.share for choice in choices.values()],
    }
    found.losses |= {name: choice.losses for name, choice in choices.items()}


def _knn(validation: Validation, found: _Found) -> None:
    choice = tune_knn(validation.first(KNN_TOKENS), make_knn_store(validation.config, validation.checkpoint))
    found.settings["knn"] = {"temperature": choice.sharpness, "weight": choice.share}
    found.losses["knn"] = choice.losses


def _dynamic(validation: Validation, found: _Found) -> None:
    rates = tune_dynamic(validation.first(DYNAMIC_TOKENS))
    found.settings["dynamic"] = {"rate": rates.rate, "decay": rates.decay}
    found.losses["dynamic"] = rates.losses
