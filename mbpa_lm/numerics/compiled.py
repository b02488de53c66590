"""Loops that Numba compiles for the CPU, where PyTorch would pass over the same numbers many times.

The machine code is kept in `__pycache__` beside the source, or in the user's cache folder where that cannot be written.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numba
import numpy as np
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


@numba.njit(fastmath={"contract"}, cache=True)
def exponential(number: np.float32) -> np.float32:
    """Return exp of a float32 within 1e-7 of its value, in operations that a loop can do on eight numbers at once.

    Numbers are taken as at least -87 and at most 88: never 0, never infinite. NumPy's own exp is called number by number.
    The polynomial is that of Cephes' expf.
    """
    number = np.float32(-87.0) if number < np.float32(-87.0) else number  # written so that NaN stays
    number = np.float32(88.0) if number > np.float32(88.0) else number
    power = np.floor(number * np.float32(1.4426950408889634) + np.float32(0.5))
    # ln 2 in two parts, the first of few digits, so that the difference is exact
    rest = number - power * np.float32(0.693359375)
    rest = rest - power * np.float32(-2.12194440e-4)
    high = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    middle = np.float32(8.3334519073e-3) * rest + np.float32(4.1665795894e-2)
    low = np.float32(1.6666665459e-1) * rest + np.float32(5.0000001201e-1)
    square = rest * rest
    polynomial = ((high * square + middle) * square + low) * square + (rest + np.float32(1.0))
    two_to_the_power = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    result: np.float32 = polynomial * two_to_the_power
    return result
