"""Is it causal, and is it the same again? Random positions of a real run, scored once more without their future.

Everything after a position's own target is replaced by other tokens, and the stream is scored from its beginning up to the end
of the chunk in which the position lies, so that every product has the shape that it had. What each expert and each mixture
gives at the position must then be the same: to the bit on a CPU, and almost so on a CUDA device, whose sums have no fixed order
(a gate, which learns from all of them, makes the most of it). Each expert's distribution there must sum to one.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mbpa_lm.data.streams import TokenStream
from mbpa_lm.errors import NumericalError
from mbpa_lm.scoring.documents import Scored

ON_CUDA = 1e-3
"""Nats by which a loss may be another one on a CUDA device; on an H200, a gate's was by 6e-8."""


def positions_to_verify(streams: Sequence[TokenStream], wanted: int, seed: int) -> list[int]:
    """Return some random positions of all streams one after another, of each of which the first token is not scored."""
    count = sum(len(stream) - 1 for stream in streams)
    return sorted(np.random.default_rng(seed).choice(count, min(wanted, count), replace=False).tolist())


def verify(
    streams: Sequence[TokenStream],
    positions: Sequence[int],
    losses: dict[str, np.ndarray],
    score: Callable[[TokenStream, int, int], Scored],
    chunk_lengths: Sequence[int],
    vocabulary_size: int,
    seed: int,
    tolerance: float = 0.0,
) -> float:
    """Score positions, which count through all streams, once more, and return the largest difference in nats.

    Args: losses (n,) of each expert and mixture, as the run gave them for all streams one after another; score makes a pass
    over a stream from the beginning, with chunks of a length, and looks at the distributions at one position; chunk_lengths
    that the streams were scored with. Raises NumericalError where a loss is another one, by more than the tolerance.
    """
    largest = 0.0
    ends = np.cumsum([len(stream) - 1 for stream in streams])
    for place in positions:
        number = int(np.searchsorted(ends, place, side="right"))
        stream = streams[number]
        position = place - int(ends[number]) + len(stream) - 1
        without_future = _without_future(stream, position, chunk_lengths[number], vocabulary_size, seed + place)
        again = score(without_future, position, chunk_lengths[number])
        for name, values in again.scores.losses.items():
            difference = abs(float(values[position]) - float(losses[name][place]))
            largest = max(largest, difference)
            if not difference <= tolerance:
                raise NumericalError(
                    f"{name} gives position {place} a loss of {losses[name][place]} in the run and {values[position]} "
                    f"from scratch without its future: it is not causal, or not repeatable on this machine"
                )
    return largest


def _without_future(stream: TokenStream, position: int, chunk_length: int, vocabulary_size: int, seed: int) -> TokenStream:
    """Return a stream up to the end of a position's chunk, what comes after the position's target being other tokens."""
    start = stream.first(min((position // chunk_length + 1) * chunk_length, len(stream) - 1) + 1)
    tokens = np.array(start.tokens)
    tokens[position + 2 :] = np.random.default_rng(seed).integers(vocabulary_size, size=len(tokens) - position - 2)
    return TokenStream(stream.name, tokens, start.characters, start.words, start.document_starts)
