"""The mixtures of all experts that were run on a stream, and what each expert is worth to the gate."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbpa_lm.experts.base import Expert
from mbpa_lm.mixture import GateRule, OnlineGate, best_weights, mix, with_uniform
from mbpa_lm.scoring import StreamScores, shared_work

GATE, EQUAL = "gate", "equal weights"
ALL_CACHES = "all caches"


@dataclass(frozen=True)
class MixedScores:
    """What the mixtures give on the stream."""

    losses: dict[str, np.ndarray]  # mixture -> (n,) nats
    seconds: dict[str, float]  # mixture -> time with everything that it needs
    gate_weights: np.ndarray  # (n, E + 1) of the experts in their order, and of the uniform distribution
    without: dict[str, float]  # left-out expert -> nats a token of the gate over the others
    best_fixed: float  # nats a token of the fixed weights that are best in hindsight: no method, a mark to compare with


def mixed_scores(scores: StreamScores, experts: Sequence[Expert], rule: GateRule, vocabulary: int) -> MixedScores:
    """Mix the experts of a pass."""
    names = [expert.name for expert in experts]
    components = np.stack([scores.components[name] for name in names], axis=1)
    with_uniform_too = with_uniform(components, vocabulary)
    parts = {part for expert in experts for part in [*shared_work(expert), expert.name, "features"]}
    needed = sum(scores.part_seconds[part] for part in parts)
    losses, seconds = {}, {}
    start = time.perf_counter()
    gate = OnlineGate(with_uniform_too.shape[1], scores.features.shape[1], rule)
    log_probabilities, weights = gate.score(with_uniform_too, scores.features)
    losses[GATE], seconds[GATE] = -log_probabilities, needed + time.perf_counter() - start
    losses[EQUAL] = -mix(components, np.full(len(names), 1 / len(names)))
    seconds |= {name: needed for name in losses if name != GATE}
    groups = {name: [name] for name in names[1:]}
    caches = [name for name in names if name.startswith("cache-")]
    if len(caches) > 1:
        groups[ALL_CACHES] = caches
    without = {}
    for left_out, group in groups.items():
        kept = [index for index, name in enumerate([*names, None]) if name not in group]
        gate = OnlineGate(len(kept), scores.features.shape[1], rule)
        without[left_out] = -float(gate.score(with_uniform_too[:, kept], scores.features)[0].mean())
    best_fixed = -float(mix(with_uniform_too, best_weights(with_uniform_too)).mean())
    return MixedScores(
        {name: values.astype(np.float32) for name, values in losses.items()}, seconds, weights, without, best_fixed
    )
