"""What a search found is looked at before anything is computed with it: checksums say only that a memory is whole."""

import math
from pathlib import Path

import torch

from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.base import Neighbours

ROUNDING = 1e-2
"""By how much a probability in half precision may be above one."""


def check_plausible(found: Neighbours, vocabulary_size: int, folder: Path) -> None:
    """Raise DatastoreError where an entry is none that a model of this vocabulary writes.

    A key that is no number shows in its distance, so keys are not read again.
    """
    entries = found.entries
    distances = torch.where(found.positions >= 0, found.squared_distances, 0)
    for what, numbers, least, most in (
        ("a next token", entries.values, 0, vocabulary_size - 1),
        ("a likely word", entries.likely_words, 0, vocabulary_size - 1),
        ("a probability", entries.likely_probabilities, 0, 1 + ROUNDING),
        ("a log-partition", entries.log_partitions, -math.inf, math.inf),
        ("a distance", distances, -math.inf, math.inf),
    ):
        if not numbers.numel():
            continue
        lowest, highest = (float(number) for number in numbers.aminmax())
        if not (least <= lowest <= highest <= most and math.isfinite(lowest) and math.isfinite(highest)):
            raise DatastoreError(
                f"the memory in {folder} holds {what} from {lowest:g} to {highest:g}, which no model of {vocabulary_size:,} "
                f"words writes; build it again"
            )
