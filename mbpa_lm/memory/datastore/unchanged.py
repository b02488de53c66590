"""A note of the size and time that files had when they were last found whole, so that opening need not read them again."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from mbpa_lm.errors import DAMAGES
from mbpa_lm.system.durable import read_json, replace_json

FILE = "unchanged.json"


def are_unchanged(folder: Path, names: Iterable[str]) -> bool:
    """Say whether the files are of the size and time that were noted."""
    try:
        return bool(read_json(folder / FILE) == _stamps(folder, names))
    except DAMAGES:
        return False


def note_unchanged(folder: Path, names: Iterable[str]) -> None:
    """Note the size and time of files that are whole; a folder that cannot be written is read again each time."""
    with contextlib.suppress(OSError):
        replace_json(folder / FILE, _stamps(folder, names))


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    found = {name: (folder / name).stat() for name in names if (folder / name).is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}
