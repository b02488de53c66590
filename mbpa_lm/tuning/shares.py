"""Experts that have a sharpness and a share beside the base model: caches and kNN-LM.

All candidates run side by side in one pass; the best share of each follows from its log-probabilities alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.checkpoints.scales import measure_norm
from mbpa_lm.config.checks import known
from mbpa_lm.experts.base import Expert
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.cache import CacheExpert
from mbpa_lm.experts.knn import KnnExpert
from mbpa_lm.memory.base import EntryStore, Neighbours
from mbpa_lm.mixing.mixture import best_weights, mix
from mbpa_lm.scoring.stream import StreamScores
from mbpa_lm.tuning.passes import Validation

THETAS = (2, 4, 6, 8, 12, 16, 24, 32)
"""Of a cache, times 1 / the mean squared norm of the hidden states."""

TEMPERATURES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Of kNN-LM, times that norm."""

NORM_TOKENS = 2000
LARGEST_SHARE = 0.99


@dataclass(frozen=True)
class Choice:
    """The best of some candidates."""

    sharpness: float
    share: float
    losses: dict[str, float]  # nats a token: base, configured, tuned


def tune_caches(validation: Validation) -> dict[str, Choice]:
    """Return the best theta and share of each configured cache, by its name."""
    cache = validation.config.cache
    configured_thetas, weights = known("cache.thetas", cache.thetas), known("cache.weights", cache.weights)
    norm = _mean_squared_norm(validation)
    thetas = [theta / norm for theta in THETAS]
    rows: dict[str, list[CacheExpert]] = {}
    for window, configured, weight in zip(cache.windows, configured_thetas, weights, strict=True):
        candidates = [CacheExpert(window, theta, weight) for theta in [configured, *thetas]]
        rows[candidates[0].name] = candidates
    scores = validation.score("tuning caches", _named([one for candidates in rows.values() for one in candidates]))
    sharpness = dict(zip(rows, configured_thetas, strict=True))
    return {name: _best(scores, rows[name], [sharpness[name], *thetas]) for name in rows}


def tune_knn(validation: Validation, store: EntryStore) -> Choice:
    """Return the best temperature and share of kNN-LM."""
    knn = validation.config.knn
    configured = known("knn.temperature", knn.temperature)
    norm = _mean_squared_norm(validation)
    temperatures = [configured, *(temperature * norm for temperature in TEMPERATURES)]
    shared = _AskedOnce(store)
    candidates = [KnnExpert(shared, knn.neighbours, temperature, knn.weight, knn.grows) for temperature in temperatures]
    return _best(validation.score("tuning knn", _named(candidates)), candidates, temperatures)


class _AskedOnce:
    """A store that answers equal questions, one after the other, with one search."""

    def __init__(self, store: EntryStore) -> None:
        self._store, self._queries = store, torch.empty(0)
        self._answer: Neighbours | None = None
        self.likely_words = store.likely_words

    def __len__(self) -> int:
        return len(self._store)

    def search(self, queries_Cd: Tensor, count: int) -> Neighbours:
        if self._answer is None or self._queries is not queries_Cd:
            self._queries, self._answer = queries_Cd, self._store.search(queries_Cd, count)
        return self._answer


def _named(candidates: Sequence[CacheExpert | KnnExpert]) -> list[Expert]:
    """Give each candidate a name of its own, and put the base model first."""
    for number, candidate in enumerate(candidates):
        candidate.name = f"{candidate.name} {number}"
    return [BaseModelExpert(), *candidates]


def _best(scores: StreamScores, candidates: Sequence[CacheExpert | KnnExpert], sharpness: Sequence[float]) -> Choice:
    """Return the best candidate with its best share; the first one is the configured one."""
    base = scores.components["base"]
    found = []
    for candidate, value in zip(candidates, sharpness, strict=True):
        pair = np.stack([base, scores.components[candidate.name]], axis=1)
        share = min(max(float(best_weights(pair)[1]), 1 - LARGEST_SHARE), LARGEST_SHARE)
        found.append((-float(mix(pair, np.array([1 - share, share])).mean()), value, share))
    loss, value, share = min(found)
    configured = float(scores.losses[candidates[0].name].mean(dtype=np.float64))
    return Choice(value, share, {"base": -float(base.mean(dtype=np.float64)), "configured": configured, "tuned": loss})


def _mean_squared_norm(validation: Validation) -> float:
    return measure_norm(validation.checkpoint.model, validation.stream.tokens[:NORM_TOKENS])
