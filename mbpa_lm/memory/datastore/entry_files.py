"""The columns of a datastore: one file each, one row an entry, memory-mapped, appended to and never changed.

Every block of BLOCK rows has a checksum, the last one of the rows it has so far. Rows beyond the acknowledged count are what
an interrupted write left; they are ignored, and cut off by the next writer.

Dimensions: `N` entries, `d` hidden size, `c` likely words.
"""

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.datastore.checksums import BlockChecksums
from mbpa_lm.memory.datastore.manifest import Layout
from mbpa_lm.system.durable import replacing
from mbpa_lm.system.machine import release_freed_memory, resident_bytes

BLOCK = 1 << 16
READ_AT_ONCE = 1 << 23
"""Bytes that are read at once where a whole file is."""
GIVES_BACK_EVERY = 0.5
"""Seconds."""
KeysOfIndex = Callable[[np.ndarray], np.ndarray]
STORED_AS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Column:
    """One file: rows of `width` numbers; bfloat16, which NumPy has not, lies in its 16 bits."""

    file: str
    stored: torch.dtype
    bits: np.dtype[Any]
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.bits.itemsize * self.width

    def encode(self, tensor: Tensor) -> bytes:
        """Return rows as they lie in the file."""
        rows = tensor.detach().cpu().to(self.stored).contiguous()
        if rows.is_floating_point() and not bool(torch.isfinite(rows).all()):
            kind = str(self.stored).removeprefix("torch.")
            raise DatastoreError(f"{self.file} cannot hold a number that is not finite in {kind}; try another memory.key_type")
        return (rows.view(torch.int16) if self.stored == torch.bfloat16 else rows).numpy().tobytes()

    def decode(self, rows: np.ndarray) -> Tensor:
        """Return rows of the file as a tensor of the stored type."""
        tensor = torch.from_numpy(rows)
        return tensor.view(torch.bfloat16) if self.stored == torch.bfloat16 else tensor


def columns(layout: Layout) -> dict[str, Column]:
    """Return the columns of a layout, by the names that Entries gives them, and the documents."""
    key_bits = {"float16": "<f2", "bfloat16": "<i2", "float32": "<f4"}[layout.key_type]
    found = {
        "keys": Column("keys.bin", STORED_AS[layout.key_type], np.dtype(key_bits), layout.hidden_size),
        "values": Column("values.bin", torch.int32, np.dtype("<i4"), 1),
        "log_partitions": Column("log_partitions.bin", torch.float32, np.dtype("<f4"), 1),
        "documents": Column("documents.bin", torch.int32, np.dtype("<i4"), 1),
    }
    if layout.likely_words:
        found["likely_words"] = Column("likely_words.bin", torch.int32, np.dtype("<i4"), layout.likely_words)
        probabilities = Column("likely_probabilities.bin", torch.float16, np.dtype("<f2"), layout.likely_words)
        found["likely_probabilities"] = probabilities
    return found


class EntryFiles:
    """The acknowledged rows of all columns, and the way to write more of them."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        count: int,
        memory_limit: int = 0,
        keys_from: int = 0,
        keys_of_index: KeysOfIndex | None = None,
    ) -> None:
        """Map `count` rows; raises DatastoreError where a file is shorter.

        Args: memory_limit: resident bytes that the process is to stay under, so that files are read and not mapped; 0: none;
        keys_from: the first row whose key is in the file, those before being what `keys_of_index` gives for rows (n,): (n, d).
        """
        self.columns = columns(layout)
        self.memory_limit = memory_limit
        self.layout = layout
        self._folder, self._count = folder, count
        self._keys_from, self._keys_of_index = keys_from, keys_of_index
        self._maps = self._mapped()
        self._gave_back = 0.0  # when, on the monotonic clock
        self._open: dict[str, io.FileIO] = {}
        self._checksums: dict[str, BlockChecksums] = {}  # of all acknowledged rows; made when something is first written
        self._appended: dict[str, BlockChecksums] = {}  # with the rows that are not acknowledged yet

    def remove(self) -> None:
        """Remove empty files."""
        for column in self.columns.values():
            path = self._folder / column.file
            if path.is_file() and not path.stat().st_size:
                path.unlink()

    def create(self) -> None:
        """Make empty files."""
        for column in self.columns.values():
            (self._folder / column.file).touch(exist_ok=False)

    def rows(self, name: str, rows: np.ndarray) -> Tensor:
        """Return the given rows (n,) of a column: (n, width)."""
        if name != "keys" or not self._keys_from:
            return self._rows_in_file(name, rows)
        assert self._keys_of_index is not None
        found = torch.empty(len(rows), self.layout.hidden_size, dtype=self.columns[name].stored)
        in_index = torch.from_numpy(rows < self._keys_from)
        found[in_index] = torch.from_numpy(self._keys_of_index(rows[rows < self._keys_from])).to(found.dtype)
        found[~in_index] = self._rows_in_file(name, rows[rows >= self._keys_from] - self._keys_from)
        return found

    def _rows_in_file(self, name: str, rows: np.ndarray) -> Tensor:
        column = self.columns[name]
        found = np.zeros((len(rows), column.width), column.bits)
        if name not in self._maps:
            return column.decode(found)
        if not self.memory_limit:
            np.take(self._maps[name], rows, axis=0, out=found, mode="clip")
            return column.decode(found)
        descriptor = self._descriptor(name)
        for row, place in zip(np.minimum(rows, self._in_file(name) - 1).tolist(), found, strict=True):
            os.preadv(descriptor, [place], row * column.row_bytes)
        return column.decode(found)

    def _descriptor(self, name: str) -> int:
        """Return a descriptor of a column's file, as it was when it was first asked for."""
        if name not in self._open:
            self._open[name] = (self._folder / self.columns[name].file).open("rb", buffering=0)
        return self._open[name].fileno()

    def _bits_between(self, name: str, begin: int, end: int) -> np.ndarray:
        """Return a copy of consecutive rows (n, width) of a file; where there is a limit, no page of the map is touched."""
        if not self.memory_limit:
            return np.array(self._maps[name][begin:end])
        column = self.columns[name]
        found = np.zeros((end - begin, column.width), column.bits)
        if len(found):
            os.preadv(self._descriptor(name), [found], begin * column.row_bytes)  # type: ignore[list-item]
        return found

    def between(self, name: str, begin: int, end: int) -> Tensor:
        """Return a copy of consecutive rows of a column: (end - begin, width)."""
        if name == "keys" and self._keys_from:
            return self.rows(name, np.arange(begin, end))
        return self.columns[name].decode(self._bits_between(name, begin, end))

    def keys(self, begin: int, end: int) -> np.ndarray:
        """Return consecutive keys (end - begin, d) in single precision."""
        return np.asarray(self.between("keys", begin, end).float().numpy())

    def keys_at(self, rows_Cn: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (N, d) as they are stored, not to be written to, and where among them (C, n) those of the rows are.

        A row of -1 is anywhere. They are the mapped file itself, or, where there is a limit, a copy of what is asked for.
        """
        if self._count and not self.memory_limit and not self._keys_from:
            return self.columns["keys"].decode(self._maps["keys"]), rows_Cn.clamp(min=0)
        found = self.rows("keys", rows_Cn.clamp(min=0).flatten().numpy())
        return found, torch.arange(rows_Cn.numel()).view(rows_Cn.shape)

    def queries_at_once(self, candidates: int) -> int:
        """Return how many queries with so many candidates each may be measured at once."""
        if not self.memory_limit:
            return 1 << 62
        return max(1, self.memory_limit // 64 // (candidates * self.columns["keys"].row_bytes))

    def append(self, entries: Entries, documents_N: Tensor, checksums: dict[str, list[str]]) -> dict[str, list[str]]:
        """Write rows behind the acknowledged ones, synced, and return the checksums of all blocks with them.

        They exist once a manifest counts them; then `acknowledge` is to be told. Args: checksums, of the rows before. Raises
        OSError where they cannot be written.
        """
        names = ("keys", "values", "log_partitions", "likely_words", "likely_probabilities")
        tensors = {**dict(zip(names, entries.tensors(), strict=True)), "documents": documents_N}
        self._appended = {}
        for name, column in self.columns.items():
            if name not in self._checksums:
                self._checksums[name] = self._checksums_so_far(name, checksums.get(column.file, []))
            data, end = column.encode(tensors[name]), self._in_file(name) * column.row_bytes
            if len(data) != len(entries.values) * column.row_bytes:
                raise ValueError(f"{name} of another shape than the memory's: {tuple(tensors[name].shape)}")
            with (self._folder / column.file).open("r+b") as file:
                file.truncate(end)
                file.seek(end)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._appended[name] = self._checksums[name].copy()
            self._appended[name].update(data)
        return {column.file: self._appended[name].digests() for name, column in self.columns.items()}

    def acknowledge(self, count: int) -> None:
        """Show the rows that were appended: a manifest counts them now."""
        self._checksums, self._appended, self._count = self._appended, {}, count
        self._maps = self._mapped()
        self.give_back()

    def give_back(self) -> None:
        """Where the limit of resident memory is near, have freed memory given back; now and then, since it takes a while."""
        now = time.monotonic()
        if self.memory_limit and now > self._gave_back + GIVES_BACK_EVERY and resident_bytes() > self.memory_limit * 3 // 4:
            release_freed_memory()
            self._gave_back = now

    def give_up_keys(self, keys_from: int) -> None:
        """Keep no key of the rows before; a manifest says so already. Raises OSError where the file cannot be replaced."""
        self._checksums, self._keys_from = {}, keys_from
        self.cut_off_keys()
        self._maps = self._mapped()

    def cut_off_keys(self) -> None:
        """Remove keys that were given up, should they still be there; who reads them may go on reading."""
        path = self._folder / self.columns["keys"].file
        if self._keys_from and not self._in_file("keys") and path.stat().st_size:
            with replacing(path) as empty:
                empty.touch()
            self._open.pop("keys", None)

    def _in_file(self, name: str) -> int:
        """Return how many rows of a column there are in its file."""
        return self._count - (self._keys_from if name == "keys" else 0)

    def damaged(self, checksums: dict[str, list[str]], on_progress: Callable[[int], None] = lambda size: None) -> str | None:
        """Return which rows of which file are not what was written, None where all are; `on_progress` is told bytes."""
        for name, column in self.columns.items():
            digests = checksums.get(column.file, [])
            skipped, count = self._count - self._in_file(name), self._in_file(name)
            if len(digests) != -(-count // BLOCK):
                return f"{column.file} (no checksums)"
            for number, digest in enumerate(digests):
                begin, end = number * BLOCK, min((number + 1) * BLOCK, count)
                found = BlockChecksums(BLOCK * column.row_bytes)
                self._read(name, begin, end, found)
                if found.digests() != [digest]:
                    return f"{column.file} (entries {skipped + begin:,} to {skipped + end - 1:,})"
                on_progress((end - begin) * column.row_bytes)
        return None

    def _checksums_so_far(self, name: str, digests: list[str]) -> BlockChecksums:
        finished = self._in_file(name) // BLOCK
        found = BlockChecksums(BLOCK * self.columns[name].row_bytes, digests[:finished])
        self._read(name, finished * BLOCK, self._in_file(name), found)
        return found

    def _read(self, name: str, begin: int, end: int, checksums: BlockChecksums) -> None:
        step = max(1, READ_AT_ONCE // self.columns[name].row_bytes)
        for first in range(begin, end, step):
            checksums.update(self._bits_between(name, first, min(first + step, end)).tobytes())

    def _mapped(self) -> dict[str, np.memmap]:
        maps = {}
        for name, column in self.columns.items():
            path, count = self._folder / column.file, self._in_file(name)
            wanted = count * column.row_bytes
            try:
                if path.is_symlink():
                    raise DatastoreError(f"{path} is a link; a memory's files lie in its folder")
                if path.stat().st_size < wanted:
                    raise DatastoreError(
                        f"{path} is cut short: it has {path.stat().st_size:,} bytes of {wanted:,}; put the file back, or "
                        f"build the memory again"
                    )
                if count:
                    maps[name] = np.memmap(path, dtype=column.bits, mode="c", shape=(count, column.width))
            except FileNotFoundError:
                if self._count:
                    raise DatastoreError(f"{path} cannot be read: it is not there; put it back, or build again") from None
            except OSError as error:
                raise DatastoreError(f"{path} cannot be read: {reason(error)}") from None
        return maps
