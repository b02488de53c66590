"""What has to be said beside the numbers of an evaluation: of a text that the vocabulary does not know, of what diverged."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

UNUSUAL = 0.05
"""By how much more of a text than of the training text may be unknown words before it is said."""
WORSE = 2.0
"""Nats a token by which an expert that diverged is worse than the base model, and than a guess."""
STEP_SIZES = {
    "mbpa": "adaptation.alpha",
    "persistent": "persistent.rate",
    "mbpa+persistent": "adaptation.alpha or persistent.rate",
    "dynamic": "dynamic.rate",
}


def unknown_shares(unknown: int | None, tokens: np.ndarray, training_counts: np.ndarray) -> dict[str, float]:
    """Return the share of a stream, and of the training text, that the vocabulary does not know; nothing where it knows all.

    Args: unknown: the token that stands for it.
    """
    if unknown is None:
        return {}
    in_training = float(training_counts[unknown] / max(1, training_counts.sum()))
    return {"unknown_share": float(np.mean(tokens == unknown)), "unknown_share_in_training": in_training}


def of_unknown_words(stream: Mapping[str, Any]) -> str | None:
    """Return what is to be said of a stream with far more unknown words than the training text, None for any other."""
    share, usual = stream.get("unknown_share", 0.0), stream.get("unknown_share_in_training", 0.0)
    if share <= usual + UNUSUAL:
        return None
    return (
        f"{share:.1%} of {stream['name']} are words that the vocabulary does not know ({usual:.1%} of the training text): each "
        f"is scored as one and the same token, and perplexity is lower for it; train with --tokenizer.kind sentencepiece"
    )


def of_diverged(experts: Mapping[str, Any], vocabulary_size: int) -> str | None:
    """Return which experts' adaptation made them far worse than a guess, and what to change; None where none did."""
    most = max(math.log(vocabulary_size), experts["base"]["nats_per_token"]) + WORSE
    diverged = [name for name in STEP_SIZES if name in experts and experts[name]["nats_per_token"] > most]
    if not diverged:
        return None
    smaller = " or ".join(dict.fromkeys(STEP_SIZES[name] for name in diverged))
    return f"{', '.join(diverged)} diverged: worse than a guess among {vocabulary_size:,} words; make {smaller} smaller"
