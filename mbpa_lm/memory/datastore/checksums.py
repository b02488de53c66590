"""SHA-256 of every block of a growing file, kept up to date as rows are appended."""

import hashlib
from typing import Any


class BlockChecksums:
    """Checksums of blocks of `block_bytes`, the last one of what it holds so far."""

    def __init__(self, block_bytes: int, finished: list[str] | None = None) -> None:
        """Go on after blocks that are finished; what an unfinished one holds must be given to `update` first."""
        self._block_bytes = block_bytes
        self._finished = list(finished or [])
        self._open: Any = hashlib.sha256()
        self._open_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take in what is appended."""
        data = memoryview(data)
        while len(data):
            part, data = data[: self._block_bytes - self._open_bytes], data[self._block_bytes - self._open_bytes :]
            self._open.update(part)
            self._open_bytes += len(part)
            if self._open_bytes == self._block_bytes:
                self._finished.append(self._open.hexdigest())
                self._open, self._open_bytes = hashlib.sha256(), 0

    def digests(self) -> list[str]:
        """Return the checksum of every block."""
        return [*self._finished, *([self._open.hexdigest()] if self._open_bytes else [])]

    def copy(self) -> "BlockChecksums":
        """Return checksums that grow independently of these."""
        other = BlockChecksums(self._block_bytes, self._finished)
        other._open, other._open_bytes = self._open.copy(), self._open_bytes
        return other
