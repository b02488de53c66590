"""A request to stop that leaves time to save: SIGTERM, which schedulers send before they end a job."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def termination_requests() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM for the length of the block, and give a function that says whether it came.

    Signals reach the main thread alone; elsewhere the answer is always no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def note(number: int, frame: Any) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
