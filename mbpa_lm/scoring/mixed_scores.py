"""The mixtures of all experts that were run on a stream, and what each expert is worth to the gate."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mbpa_lm.experts.base import Expert
from mbpa_lm.mixing.gate import GateRule, OnlineGate
from mbpa_lm.mixing.mixture import best_weights, mix, with_uniform
from mbpa_lm.scoring.guard import check_mixture
from mbpa_lm.scoring.stream import StreamScores, shared_work

GATE, TUNED, FIXED, EQUAL = "gate", "tuned weights", "fixed weights", "equal weights"
UNIFORM = "uniform"
ALL_CACHES = "all caches"


@dataclass(frozen=True)
class MixedScores:
    """What the mixtures give on the stream."""

    losses: dict[str, np.ndarray]  # mixture -> (n,) nats
    seconds: dict[str, float]  # mixture -> time with everything that it needs
    gate_weights: np.ndarray  # (n, E + 1) of the experts in their order, and of the uniform distribution
    without: dict[str, float]  # left-out expert -> nats a token of the gate over the others
    with_noise: float  # nats a token of the gate with one more expert, whose distributions are drawn at random
    best_fixed: float  # nats a token of the fixed weights that are best in hindsight: no method, a mark to compare with


def mixed_scores(
    scores: StreamScores,
    experts: Sequence[Expert],
    rule: GateRule,
    vocabulary: int,
    seed: int,
    fixed: Mapping[str, float] | None = None,
    tuned: Mapping[str, float] | None = None,
) -> MixedScores:
    """Mix the experts of a pass.

    Args: fixed has weights by expert, None for equal ones; tuned has the weight of each expert, and of the uniform
    distribution, that were best on another text; without them there is no such mixture.
    """
    names = [expert.name for expert in experts]
    components = all_components(scores, names, vocabulary)
    parts = {part for expert in experts for part in [*shared_work(expert), expert.name]}
    needed = sum(scores.part_seconds[part] for part in parts)
    start = time.perf_counter()
    gated, weights = _gate(components, scores.features, rule)
    losses = {GATE: -gated}
    seconds = {GATE: needed + scores.part_seconds["features"] + time.perf_counter() - start}
    if tuned is not None:
        losses[TUNED] = -mix(components, np.array([tuned[name] for name in [*names, UNIFORM]]))
    if fixed:
        losses[FIXED] = -mix(components[:, :-1], np.array([fixed.get(name, 0.0) for name in names]))
    else:
        losses[EQUAL] = -mix(components[:, :-1], np.full(len(names), 1 / len(names)))
    for name, values in losses.items():
        check_mixture(name, values)
    seconds |= {name: needed for name in losses if name != GATE}
    groups = {name: [name] for name in names[1:]}
    caches = [name for name in names if name.startswith("cache-")]
    if len(caches) > 1:
        groups[ALL_CACHES] = caches
    without = {}
    for left_out, group in groups.items():
        kept = [index for index, name in enumerate([*names, UNIFORM]) if name not in group]
        without[left_out] = -float(_gate(components[:, kept], scores.features, rule)[0].mean())
    noisy = np.column_stack([components, _noise(len(components), vocabulary, seed)])
    return MixedScores(
        losses={name: values.astype(np.float32) for name, values in losses.items()},
        seconds=seconds,
        gate_weights=weights,
        without=without,
        with_noise=-float(_gate(noisy, scores.features, rule)[0].mean()),
        best_fixed=-float(mix(components, best_weights(components)).mean()),
    )


def all_components(scores: StreamScores, names: Sequence[str], vocabulary: int) -> np.ndarray:
    """Return the log-probabilities (n, E + 1) that the named experts and the uniform distribution gave."""
    return with_uniform(np.stack([scores.components[name] for name in names], axis=1), vocabulary)


def _gate(components: np.ndarray, features: np.ndarray, rule: GateRule) -> tuple[np.ndarray, np.ndarray]:
    return OnlineGate(components.shape[1], features.shape[1], rule).score(components, features)


def _noise(positions: int, vocabulary: int, seed: int) -> np.ndarray:
    """Return what experts give any word (n,) whose distributions are drawn anew, all equally likely, at each position."""
    # In such a distribution a word's share of the whole is an exponential variable over the sum of `vocabulary` of them.
    draws = np.random.default_rng(seed).exponential(size=positions)
    log_shares: np.ndarray = np.log(np.maximum(draws, 1e-12)) - math.log(vocabulary)
    return log_shares
