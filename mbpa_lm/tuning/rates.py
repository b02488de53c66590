"""Rate and decay of what learns from the stream, slow weights and dynamic evaluation: by doubling and halving each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mbpa_lm.config.checks import known
from mbpa_lm.errors import AdaptationError
from mbpa_lm.experts.persistent import PersistentExpert
from mbpa_lm.scoring.resources import make_experts
from mbpa_lm.tuning.passes import Validation

FACTOR = 2.0
MOST_STEPS = 4


@dataclass(frozen=True)
class Rates:
    """The best rate and decay, in the units of the configuration."""

    rate: float
    decay: float
    losses: dict[str, float]  # nats a token: configured, tuned


def tune_persistent(validation: Validation) -> Rates:
    """Return the best rate and decay of the slow weights."""

    def loss(rate: float, decay: float) -> float:
        persistent = replace(validation.config.persistent, rate=rate, decay=decay)
        changed = replace(validation, config=replace(validation.config, persistent=persistent))
        what = f"tuning persistent (rate {rate:.2g}, decay {decay:.2g})"
        return _mean(changed.score(what, [PersistentExpert()]).losses["persistent"])

    return _tune(loss, known("persistent.rate", validation.config.persistent.rate), validation.config.persistent.decay)


def tune_dynamic(validation: Validation) -> Rates:
    """Return the best rate and decay of dynamic evaluation."""

    def loss(rate: float, decay: float) -> float:
        config = validation.config
        dynamic = replace(config.dynamic, rate=rate, decay=decay)
        only = replace(config, dynamic=dynamic, evaluation=replace(config.evaluation, experts=["dynamic"]))
        changed = replace(validation, config=only)
        experts = make_experts(only, validation.checkpoint)
        what = f"tuning dynamic (rate {rate:.2g}, decay {decay:.2g})"
        return _mean(changed.score(what, experts).losses["dynamic"])

    return _tune(loss, known("dynamic.rate", validation.config.dynamic.rate), validation.config.dynamic.decay)


def climb(loss: Callable[[float], float], start: float) -> tuple[float, float]:
    """Return the best of start times powers of FACTOR, going up or down for as long as it helps, and its loss."""
    best, least = start, loss(start)
    for factor in (FACTOR, 1 / FACTOR):
        for _ in range(MOST_STEPS):
            found = loss(best * factor)
            if not found < least:
                break
            best, least = best * factor, found
        if best != start:
            break
    return best, least


def _tune(loss: Callable[[float, float], float], rate: float, decay: float) -> Rates:
    seen: dict[tuple[float, float], float] = {}

    def known(rate: float, decay: float) -> float:
        if (rate, decay) not in seen:
            try:
                seen[rate, decay] = loss(rate, decay)
            except AdaptationError:
                seen[rate, decay] = math.inf
        return seen[rate, decay]

    best_rate, _ = climb(lambda value: known(value, decay), rate)
    best_decay, least = climb(lambda value: known(best_rate, value), decay)
    return Rates(best_rate, best_decay, {"configured": known(rate, decay), "tuned": least})


def _mean(losses: np.ndarray) -> float:
    mean = float(losses.mean(dtype=np.float64))
    return mean if math.isfinite(mean) else math.inf
