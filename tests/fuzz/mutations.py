"""Strange files, made from bytes that a fuzzer chose: bytes as they are, or a valid file that was changed."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from mbpa_lm.errors import MbpaError
from mbpa_lm.system.durable import CHECKSUM, sealed

Read = Callable[[bytes], None]
"""Makes a file from bytes and reads it as the package does."""

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 65535, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "..", "../../etc/passwd", "/etc/passwd", "a" * 300, "\x00", "\ud800", "lstm", "transformer", "word", [], [[]], [None], {},
    {"": {}}, ["a"] * 70,
]  # fmt: skip


def edited(values: Any, data: bytes) -> Any:
    """Return JSON values in which a place for every two bytes holds something strange, or something from another place."""
    values = json.loads(json.dumps(values))
    for where, what in zip(data[::2], data[1::2], strict=False):
        places = list(_places(values))
        if not places:
            break
        holder, key = places[where % len(places)]
        other, other_key = places[what % len(places)]
        strange = STRANGE[what % len(STRANGE)] if what < 200 else other[other_key]
        if what == 255 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = json.loads(json.dumps(strange))
    return values


def _places(values: Any) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items):
        yield values, key
        yield from _places(value)


def variants(data: bytes, valid: Any) -> bytes:
    """Return the content of a JSON file: bytes as they are, or a valid one that was edited."""
    if not data or data[0] % 2:
        return data[1:]
    return json.dumps(edited(valid, data[1:9])).encode("utf-8", "surrogatepass")


def signed(content: bytes) -> bytes:
    """Return the content of a JSON file with the checksum that it would have."""
    try:
        values = json.loads(content)
        return json.dumps(sealed({key: values[key] for key in values if key != CHECKSUM})).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError):
        return content


def patched(valid: bytes, data: bytes) -> bytes:
    """Return bytes as they are, or a valid file in which stretches are replaced or which ends early."""
    if not data or data[0] % 4 == 3:
        return data[1:]
    content = bytearray(valid)
    rest = data[1:]
    while len(rest) >= 4 and content:
        at, count = int.from_bytes(rest[:3], "little") % len(content), rest[3] % 9
        content[at : at + count] = rest[4 : 4 + count]
        rest = rest[4 + count :]
    return bytes(content[: len(content) - (data[0] if data[0] % 4 == 2 else 0)])


def tolerant(read: Callable[[], object]) -> None:
    with contextlib.suppress(MbpaError):
        read()
