"""Files that are whole whatever happens: written beside, synced, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from mbpa_lm.errors import DatastoreError, reason

CHECKSUM = "checksum"
LONGEST_JSON = 64 << 20
"""Bytes of the longest JSON file that is read: no file of this package is nearly as long."""


class NoRegularFile(ValueError):
    """A folder, a pipe or a device where a file was wanted."""


def open_file(path: Path) -> BufferedReader:
    """Open a file to be read; raises OSError where it cannot, NoRegularFile for a pipe or a device, which may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NoRegularFile("it is no regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> Any:
    """Read a JSON file that somebody else may have written; raises OSError, ValueError or RecursionError where it is none."""
    with open_file(path) as file:
        content = file.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise ValueError(f"{path} is longer than {LONGEST_JSON >> 20} MiB")
    return json.loads(content)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file in place."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return values of JSON with a hash over them, by which an altered digit is found."""
    return {**values, CHECKSUM: _hash(values)}


def unsealed(values: Any) -> dict[str, Any]:
    """Return what `sealed` was given; raises ValueError where it is another."""
    if not isinstance(values, dict) or values.get(CHECKSUM) != _hash({key: values[key] for key in values if key != CHECKSUM}):
        raise ValueError("its content is not what was written")
    return {key: values[key] for key in values if key != CHECKSUM}


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def replace_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all; raises OSError where it cannot."""
    with replacing(path) as temporary:
        write_json(temporary, values)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` once it is on disk; what was there stays where that fails."""
    temporary = path.with_name(f".{path.name}.saving")
    try:
        temporary.unlink(missing_ok=True)  # it might be a link
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_lock(path: Path) -> int | None:
    """Return a descriptor that holds a file locked until it is closed or the process ends; None where another holds it.

    Raises OSError where the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno != errno.EWOULDBLOCK:
            raise
        return None
    return descriptor


def lock_open_file(file: IO[Any]) -> None:
    """Lock a file until it is closed or the process ends; raises BlockingIOError where another process holds it.

    Where the file system knows no locks, nothing happens.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise


def hold(path: Path, what: Path) -> int:
    """Return what `take_lock` does; raises DatastoreError, naming what is locked, where another process holds it."""
    try:
        lock = take_lock(path)
    except OSError as error:
        raise DatastoreError(f"{what} cannot be written: {reason(error)}") from None
    if lock is None:
        raise DatastoreError(f"{what} is being written by another process; wait until it is done")
    return lock
