"""How many tokens are processed at once where memory is limited."""

from types import SimpleNamespace
from typing import Any

import pytest

from mbpa_lm.config import Config, EvaluationConfig, MemoryConfig
from mbpa_lm.scoring.resources import chunk_length


@pytest.mark.parametrize(
    ("resident_gib", "neighbours", "wanted", "expected"),
    [
        (0.0, 256, 256, 256),  # no limit, and room enough
        (0.0, 5000, 256, (1 << 29) // (4 * 400 * 5000)),
        (1.0, 256, 256, (1 << 23) // (4 * 400 * 256)),  # a 128th of a GiB holds the keys of 20 positions
        (1.0, 256, 10, 10),  # fewer were asked for
        (1.0, 0, 256, 256),  # nobody searches
        (1e-6, 256, 256, 1),
    ],
)
def test_neighbours_of_a_chunk_fit_into_their_share(resident_gib: float, neighbours: int, wanted: int, expected: int) -> None:
    memory, evaluation = MemoryConfig(resident_gib=resident_gib), EvaluationConfig(chunk_length=wanted)
    experts: Any = [SimpleNamespace(neighbours=0), SimpleNamespace(neighbours=neighbours)]
    assert chunk_length(Config(memory=memory, evaluation=evaluation), experts, 400) == expected
