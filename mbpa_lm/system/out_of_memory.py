"""Out of memory, on the host or the device: how it shows, and how work on a chunk goes on in halves."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mbpa_lm.system.progress import console

Result = TypeVar("Result")

HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""What PyTorch's allocator on the host says."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is one of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in HOST_MESSAGES)


def in_halves(work: Callable[[slice], Result], positions: int, what: str) -> Sequence[Result]:
    """Do some work on positions 0 to `positions`, all at once, or in halves, and halves of these, where memory does not do.

    The work must change nothing before it has what it needs. Raises what it raises for a single position, and any other error.
    """
    left, done = [slice(0, positions)], []
    while left:
        part = left.pop()
        try:
            done.append(work(part))
            continue
        except (MemoryError, RuntimeError) as error:
            count = part.stop - part.start
            if count == 1 or not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        console.print(f"out of memory for {what} on {count:,} positions at once: going on with {-(-count // 2):,}")
        middle = part.start + -(-count // 2)
        left += [slice(middle, part.stop), slice(part.start, middle)]
    return done
