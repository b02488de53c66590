"""Loops that Numba compiles for the CPU, where PyTorch would pass over the same numbers many times.

The machine code is kept in `__pycache__` beside the source, or in the user's cache folder where that cannot be written.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numba
import torch
from torch import Tensor

TAKEN = (torch.float32, torch.float64, torch.int32, torch.int64)
FASTMATH = {"reassoc", "contract", "nsz"}
"""Sums may be taken in any order; infinities and NaN stay what they are."""


def can_take(*tensors: Tensor) -> bool:
    """Say whether compiled loops can work on the tensors: on the CPU, of full precision, of a kind that NumPy has."""
    return all(tensor.device.type == "cpu" and tensor.dtype in TAKEN for tensor in tensors)


def compiled_loop(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function over NumPy arrays whose outer loop (`numba.prange`) is shared by as many threads as PyTorch uses."""
    kernel: Any = numba.njit(parallel=True, fastmath=FASTMATH, cache=True)(function)

    @wraps(function)
    def call(*arguments: Any) -> None:
        available: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        numba.set_num_threads(min(torch.get_num_threads(), available))
        kernel(*arguments)

    return call


def compiled_part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that compiled loops call."""
    part: Callable[..., Any] = numba.njit(fastmath=FASTMATH, cache=True)(function)
    return part
