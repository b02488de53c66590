"""Step sizes and sharpnesses that follow from how large a model's hidden states are, where the configuration leaves them open.

A step of size alpha along a key h moves a logit at h by alpha |h|^2, a cache weighs exp(theta h.q), and kNN-LM exp(-|h - q|^2 /
temperature): in a model whose states are ten times as long, what was right for another is wrong by a hundred; in units of the
mean squared norm it is not. A step of the slow weights for a word that was rare in training moves its logit by
rate / (smoothing * s) |h|^2, where s is the mean size of gradients in training; that mean is the smaller, the larger the
vocabulary. The numbers here were right for LSTMs on the validation texts of PTB and of Python's documentation.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mbpa_lm.config import Config
from mbpa_lm.errors import DAMAGES
from mbpa_lm.models.base import LanguageModel
from mbpa_lm.system.durable import read_json, replace_json, sealed, unsealed

FILE = "hidden_states.json"
TOKENS = 2048
ALPHA, THETA, TEMPERATURE = 2.0, 12.8, 0.25
PERSISTENT_STEP, DYNAMIC_STEP = 146.0, 97.0
"""rate / (smoothing * s) times the mean squared norm, where most words are rare."""
MANY_WORDS = 10_000
"""Size of the vocabulary from which most words are rare; with fewer, each is met more often, and steps are as much shorter."""
SHARE = 0.1
"""Of a cache where it predicts alone."""


def fill_in(config: Config, vocabulary_size: int, norm: Callable[[], float], gradient_size: Callable[[], float]) -> Config:
    """Return the configuration with a number for everything that it leaves open and an expert to be run needs.

    Args: norm and gradient_size measure the mean squared norm of hidden states and s where they are needed.
    """
    wanted, adaptation, persistent = set(config.evaluation.experts), config.adaptation, config.persistent
    cache, knn, dynamic = config.cache, config.knn, config.dynamic
    cache = replace(cache, weights=[SHARE] * len(cache.windows) if cache.weights is None else cache.weights)
    rare = min(1.0, vocabulary_size / MANY_WORDS)
    if wanted & {"mbpa", "mbpa+persistent"} and adaptation.alpha is None:
        adaptation = replace(adaptation, alpha=ALPHA / norm())
    if wanted & {"persistent", "mbpa+persistent"} and persistent.rate is None:
        rate = PERSISTENT_STEP * rare * persistent.smoothing * gradient_size() / norm()
        persistent = replace(persistent, rate=rate)
    if "cache" in wanted and cache.thetas is None:
        cache = replace(cache, thetas=[THETA / norm()] * len(cache.windows))
    if "knn" in wanted and knn.temperature is None:
        knn = replace(knn, temperature=TEMPERATURE * norm())
    if "dynamic" in wanted and dynamic.rate is None:
        unit = dynamic.smoothing * gradient_size() if dynamic.optimizer == "rms" else 1.0
        dynamic = replace(dynamic, rate=DYNAMIC_STEP * rare * unit / norm())
    return replace(config, adaptation=adaptation, persistent=persistent, cache=cache, knn=knn, dynamic=dynamic)


def mean_squared_norm(folder: Path, model: LanguageModel, training_tokens: Callable[[], np.ndarray]) -> float:
    """Return the mean squared norm of hidden states on the first training tokens, measured once a checkpoint."""
    path = folder / FILE
    try:
        kept = unsealed(read_json(path))
        if kept["tokens"] == TOKENS and 0 < kept["mean_squared_norm"] < math.inf:
            return float(kept["mean_squared_norm"])
    except DAMAGES:
        pass
    norm = measure_norm(model, training_tokens()[:TOKENS])
    with contextlib.suppress(OSError):  # it is measured again next time
        replace_json(path, sealed({"tokens": TOKENS, "mean_squared_norm": norm}))
    return norm


@torch.no_grad()
def measure_norm(model: LanguageModel, tokens: np.ndarray) -> float:
    """Return the mean squared norm of the hidden states after given tokens; 1 where it is no positive number."""
    read = torch.from_numpy(tokens.astype(np.int64)).to(model.output_layer().weight.device)
    norm = float(model(read[None]).hidden_states[0].float().square().sum(1).mean())
    return norm if math.isfinite(norm) and norm > 0 else 1.0
