"""Files that are whole whatever happens: written beside, synced, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mbpa_lm.errors import DatastoreError, reason


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file in place."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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
    with path.open("rb") as file:
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
