"""A mapped file that becomes shorter while it is read: the system ends the process by SIGBUS, and this says why first.

Python's own handlers run after the instruction that was interrupted, and this one can never finish; so the handler is machine
code that calls nothing but `write` and `_exit`, which POSIX allows in one.
"""

import ctypes
import signal
from typing import Any

LOST_FILE = 11
"""Exit code of a process whose mapped file cannot be read any more."""

MESSAGE = (
    "error: a mapped file (text, memory or weights) became shorter while it was read, or its disk failed; put the file back, "
    "or delete it where it can be built again, and go on: what was saved before is whole\n"
)


def say_what_a_bus_error_is() -> None:
    """Have this process end with one line and LOST_FILE at a SIGBUS, where nothing else has been arranged for."""
    import numba
    import numpy as np

    types: Any = numba.types
    text = np.frombuffer(MESSAGE.encode(), dtype=np.uint8)
    write = types.ExternalFunction("write", types.intp(types.int32, types.voidptr, types.intp))
    leave = types.ExternalFunction("_exit", types.void(types.int32))

    @numba.cfunc(types.void(types.int32))
    def handler(number: int) -> None:
        write(2, text.ctypes, text.size)
        leave(LOST_FILE)

    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    earlier = set_handler(signal.SIGBUS, handler.address)
    if earlier:
        set_handler(signal.SIGBUS, earlier)
    else:
        _KEPT.append(handler)


_KEPT: list[object] = []
"""The handler, so that its machine code is not given up."""
