"""Out of memory, on the host or the device: how it shows, and how work on a chunk goes on in halves."""

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from mbpa_lm.system.progress import console

Result = TypeVar("Result")

HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""What PyTorch's allocator on the host says."""


class OnePositionTooLarge(MemoryError):
    """There is not even the memory for a single position: nothing is left to be halved."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is one of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in HOST_MESSAGES)


def in_halves(work: Callable[[slice], Result], positions: int, what: str) -> Iterator[Result]:
    """Do some work on positions 0 to `positions`, all at once, or in halves, and halves of these, where memory does not do.

    Each part is worked on when its turn comes, so that what another gave need not be there any more. The work must change
    nothing before it has what it needs. Raises OnePositionTooLarge, and any other error that the work raises.
    """
    left = [slice(0, positions)]
    while left:
        part = left.pop()
        try:
            result = work(part)
        except (MemoryError, RuntimeError) as error:
            count = part.stop - part.start
            if not is_out_of_memory(error):
                raise
            if count == 1:
                raise OnePositionTooLarge(str(error)) from None
        else:
            yield result
            del result
            continue
        empty_cuda_cache()
        console.print(f"out of memory for {what} on {count:,} positions at once: going on with {-(-count // 2):,}")
        middle = part.start + -(-count // 2)
        left += [slice(middle, part.stop), slice(part.start, middle)]


def release_memory() -> None:
    """Free what nothing uses any more, also what holds itself, which takes a while."""
    gc.collect()
    empty_cuda_cache()


def empty_cuda_cache() -> None:
    """Give what PyTorch keeps of a CUDA device's memory, without using it, back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
