"""Is it causal, and is it the same again? Random positions of a real run, scored once more without their future.

Everything after a position's own target is replaced by other tokens, and the stream is scored from its beginning up to the end
of the chunk in which the position lies, so that every product has the shape that it had. What each expert and each mixture
gives at the position must then be the same, to the bit. Each expert's distribution there must sum to one.
"""

from collections.abc import Callable

import numpy as np

from mbpa_lm.data.streams import TokenStream
from mbpa_lm.documents import Scored
from mbpa_lm.errors import NumericalError


def verify(
    stream: TokenStream,
    losses: dict[str, np.ndarray],
    score: Callable[[TokenStream, int], Scored],
    positions: int,
    chunk_length: int,
    vocabulary_size: int,
    seed: int,
) -> list[int]:
    """Score some positions again and return which they were.

    Args: losses (n - 1,) of each expert and mixture, as the run gave them; score makes a pass over a stream from the beginning
    and looks at the distributions at one position. Raises NumericalError where a loss is another one.
    """
    generator, count = np.random.default_rng(seed), len(stream) - 1
    chosen = sorted(generator.choice(count, min(positions, count), replace=False).tolist())
    for position in chosen:
        end = min((position // chunk_length + 1) * chunk_length, count)
        tokens = np.array(stream.tokens[: end + 1])
        tokens[position + 2 :] = generator.integers(vocabulary_size, size=len(tokens) - position - 2)
        start = stream.first(end + 1)
        again = score(TokenStream(stream.name, tokens, start.characters, start.words, start.document_starts), position)
        for name, values in again.scores.losses.items():
            if values[position] != losses[name][position]:
                raise NumericalError(
                    f"{name} gives position {position} a loss of {losses[name][position]} in the run and {values[position]} "
                    f"from scratch without its future: it is not causal, or not repeatable on this machine"
                )
    return chosen
