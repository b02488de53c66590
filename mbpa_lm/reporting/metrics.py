"""From the loss of every token to the numbers of a report.

Conventions. The first token of a stream is read and not scored, as there is nothing before it; every other token is,
`<eos>` included. Losses are in nats. "Per word" divides by the words and line ends that the scored tokens begin, "per
character" by the characters of text that they cover, so models with different tokenizers can be compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbpa_lm.data.streams import TokenStream
from mbpa_lm.numerics.perplexities import perplexity

FREQUENCY_BOUNDS = (0, 10, 100, 1_000, 10_000)
"""A target word seen at most so often in training, and more often than the bound before."""

DISTANCE_BOUNDS = (10, 100, 1_000, 10_000)
"""Positions since the target word's last occurrence in the stream, likewise."""

DOCUMENT_BOUNDS = (10, 100, 1_000, 10_000)
"""Positions inside a document, likewise."""

RARE = 10
SEGMENTS = 20
"""Equal parts of the stream along which the loss is shown."""


@dataclass(frozen=True)
class Targets:
    """What is known of each scored token, beside its loss; all of length n - 1 for a stream of n tokens."""

    training_counts: np.ndarray  # occurrences of the token in the training text
    distances: np.ndarray  # positions since the token's last occurrence in the stream; 0 where there was none
    document_positions: np.ndarray  # 1 for the first token of its document
    words: int
    characters: int

    @classmethod
    def of(cls, stream: TokenStream, training_counts: np.ndarray) -> "Targets":
        tokens = np.asarray(stream.tokens, dtype=np.int64)
        positions = np.arange(len(tokens))
        order = np.argsort(tokens, kind="stable")  # equal tokens side by side, in the order of the stream
        again = tokens[order[1:]] == tokens[order[:-1]]
        distances = np.zeros(len(tokens), dtype=np.int64)
        distances[order[1:][again]] = (order[1:] - order[:-1])[again]
        document = np.searchsorted(stream.document_starts, positions, side="right") - 1
        return cls(
            training_counts=training_counts[tokens[1:]],
            distances=distances[1:],
            document_positions=(positions - stream.document_starts[document] + 1)[1:],
            words=int(stream.words[1:].sum(dtype=np.int64)),
            characters=int(stream.characters[1:].sum(dtype=np.int64)),
        )

    @classmethod
    def joined(cls, parts: Sequence["Targets"]) -> "Targets":
        """Return those of streams that were scored one after another, each by itself."""
        arrays = ("training_counts", "distances", "document_positions")
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
            words=sum(part.words for part in parts),
            characters=sum(part.characters for part in parts),
        )


def summarize(losses: np.ndarray, targets: Targets) -> dict[str, Any]:
    """Return the report of one expert from its loss (n - 1,) in nats for every scored token."""
    total = float(losses.sum(dtype=np.float64))
    bits = total / math.log(2)
    again = targets.distances > 0
    rare_again = (targets.training_counts <= RARE) & again
    return {
        **_group(losses),
        "bits_per_token": bits / len(losses),
        "bits_per_word": bits / max(targets.words, 1),
        "bits_per_character": bits / max(targets.characters, 1),
        "perplexity_per_word": perplexity(total / max(targets.words, 1)),
        "by_training_frequency": _by_bounds(losses, targets.training_counts, FREQUENCY_BOUNDS),
        "by_recurrence": {
            "first time in the stream": _group(losses[~again]),
            "seen before in the stream": _group(losses[again]),
            f"seen before, at most {RARE} times in training": _group(losses[rare_again]),
        },
        "by_distance": _by_bounds(losses[again], targets.distances[again], DISTANCE_BOUNDS),
        "by_document_position": _by_bounds(losses, targets.document_positions, DOCUMENT_BOUNDS),
        "along_stream": [_group(part) for part in np.array_split(losses, SEGMENTS) if len(part)],
    }


def _group(losses: np.ndarray) -> dict[str, Any]:
    if len(losses) == 0:
        return {"tokens": 0, "nats_per_token": None, "perplexity": None}
    mean = float(losses.mean(dtype=np.float64))
    return {"tokens": len(losses), "nats_per_token": mean, "perplexity": perplexity(mean)}


def _by_bounds(losses: np.ndarray, numbers: np.ndarray, bounds: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    group = np.searchsorted(bounds, numbers, side="left")
    names = [_bound_name(bounds, index) for index in range(len(bounds) + 1)]
    return {name: _group(losses[group == index]) for index, name in enumerate(names)}


def _bound_name(bounds: tuple[int, ...], index: int) -> str:
    low = bounds[index - 1] + 1 if index else 0
    if index == len(bounds):
        return f"more than {bounds[-1]:,}"
    high = bounds[index]
    if high == 0:
        return "unseen"
    return f"{max(low, 1):,}-{high:,}"
