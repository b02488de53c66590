"""Writes in batches, one after another, from a thread of their own; what is not acknowledged yet can still be read.

Dimensions: `N` entries.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.remote.rows import joined

Write = Callable[[int, Entries, Tensor], None]
"""Writes entries from a position on, with the documents (N,) that they come from; returns once they are acknowledged."""


class Writer:
    """Entries on their way to where they stay.

    An error of a write is raised by every later call, and nothing is written any more: positions are never skipped.
    """

    def __init__(self, write: Write, size: int, queued: int, end: int) -> None:
        """Args: size: entries a batch; queued: batches that may wait; end: the position of the first entry to come."""
        self._write, self._size, self._queued = write, size, queued
        self._acknowledged = self._end = end
        self._filling: list[tuple[Entries, Tensor]] = []
        self._filled = 0
        self._sent: deque[tuple[Entries, Future[None]]] = deque()
        self._thread = ThreadPoolExecutor(1, "mbpa-remote-writer")
        self._failed = threading.Event()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._end

    def put(self, entries: Entries, documents_N: Tensor) -> None:
        """Take entries to be written; waits where `queued` batches wait already."""
        with self._lock:
            self._acknowledge()
            begin, count = 0, len(entries.values)
            while begin < count:
                rows = slice(begin, min(count, begin + self._size - self._filled))
                self._filling.append((entries.rows(rows), documents_N[rows]))
                self._filled += rows.stop - rows.start
                self._end += rows.stop - rows.start
                begin = rows.stop
                if self._filled == self._size:
                    self._send()

    def unacknowledged(self) -> tuple[int, list[Entries]]:
        """Return how many entries are acknowledged, and those that came after them."""
        with self._lock:
            self._acknowledge()
            return self._acknowledged, [entries for entries, _ in (*self._sent, *self._filling)]

    def flush(self) -> None:
        """Wait until everything is acknowledged."""
        with self._lock:
            self._acknowledge()
            if self._filling:
                self._send()
            self._acknowledge(leave=0)

    def close(self) -> None:
        """Wait for what is being written, and end the thread; what failed is not tried again."""
        self._thread.shutdown()

    def _send(self) -> None:
        """Hand over what has come together as one batch."""
        self._acknowledge(leave=self._queued - 1)
        entries = joined([entries for entries, _ in self._filling])
        documents_N = torch.cat([documents_N for _, documents_N in self._filling])
        first = self._end - self._filled
        self._sent.append((entries, self._thread.submit(self._write_next, first, entries, documents_N)))
        self._filling, self._filled = [], 0

    def _write_next(self, first: int, entries: Entries, documents_N: Tensor) -> None:
        if self._failed.is_set():
            return
        try:
            self._write(first, entries, documents_N)
        except BaseException:
            self._failed.set()
            raise

    def _acknowledge(self, leave: int | None = None) -> None:
        """Forget batches that are written; waits until no more than `leave` are not. Raises what a write has raised."""
        while self._sent and (self._sent[0][1].done() or (leave is not None and len(self._sent) > leave)):
            entries, written = self._sent[0]
            written.result()
            self._sent.popleft()
            self._acknowledged += len(entries.values)
