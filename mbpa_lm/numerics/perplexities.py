"""From a mean loss to a perplexity."""

import math

HIGHEST = 700.0
"""Nats beyond which a float overflows; a model that loses so many predicts nothing anyway."""


def perplexity(mean: float) -> float:
    """Return exp of a mean loss in nats."""
    return math.exp(min(mean, HIGHEST))
