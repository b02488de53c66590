"""The manifest of a datastore: what it is, how many entries are acknowledged, and the checksums of all files.

It is replaced whole, and carries its own checksum; what it does not count does not exist.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mbpa_lm.durable import replace_json
from mbpa_lm.errors import DatastoreError, reason

FORMAT = 1
FILE = "manifest.json"
KeyType = Literal["float16", "bfloat16", "float32"]
IndexKind = Literal["flat", "ivf_flat", "ivf_pq", "hnsw", "cagra"]


@dataclass(frozen=True)
class Identity:
    """Whose hidden states the keys are; a memory is of use to no other model."""

    model: str  # fingerprint of the weights
    tokenizer: str  # fingerprint of the tokenizer


@dataclass(frozen=True)
class Layout:
    """The shape of an entry; it never changes."""

    hidden_size: int  # d
    likely_words: int = 0  # c
    key_type: KeyType = "float16"


@dataclass(frozen=True)
class IndexRecord:
    """An index over the first entries."""

    kind: IndexKind
    file: str
    entries: int
    bytes: int
    sha256: str
    search: dict[str, int]  # effort: cells that a query looks into, or candidates kept in a graph; cells: of how many
    recall: dict[str, float]  # measured against exact search: at, recall, queries


@dataclass(frozen=True)
class Source:
    """A text that was read into the memory, from the first entry it gave on."""

    name: str
    fingerprint: str
    first_entry: int
    first_document: int
    entries: int  # it gives in all; fewer are there while it is being read


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a datastore without reading its entries."""

    identity: Identity
    layout: Layout
    entries: int = 0
    documents: int = 0
    checksums: dict[str, list[str]] = field(default_factory=dict)  # file -> SHA-256 of each block of rows
    index: IndexRecord | None = None
    sources: tuple[Source, ...] = ()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest; it is on disk when this returns. Raises OSError where it cannot be."""
    values = {"format": FORMAT, "metric": "squared euclidean", **dataclasses.asdict(manifest)}
    replace_json(folder / FILE, {**values, "checksum": _checksum(values)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest; raises DatastoreError where there is none, or a damaged one."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatastoreError(f"{folder} holds no memory; make one with mbpa-memory build --output {folder}") from None
    except (OSError, ValueError) as error:
        raise DatastoreError(f"{path} cannot be read ({reason(error)}); put it back, or build the memory again") from None
    try:
        if values["format"] != FORMAT:
            raise DatastoreError(f"{folder} is a memory of format {values['format']}; this version reads format {FORMAT}")
        if values.pop("checksum") != _checksum(values):
            raise ValueError("its content is not what was written")
        return _parse(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatastoreError(f"{path} is damaged ({reason(error)}); put it back, or build the memory again") from None


def check_identity(folder: Path, found: Identity, wanted: Identity) -> None:
    """Refuse a memory of another model or tokenizer, showing both fingerprints."""
    for what in ("model", "tokenizer"):
        one, other = getattr(found, what), getattr(wanted, what)
        if one != other:
            raise DatastoreError(
                f"the memory in {folder} was written with {what} {one[:12]}, this {what} is {other[:12]}; "
                f"build it again with mbpa-memory build"
            )


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parse(values: dict[str, Any]) -> Manifest:
    index = values["index"]
    manifest = Manifest(
        Identity(**values["identity"]),
        Layout(**values["layout"]),
        int(values["entries"]),
        int(values["documents"]),
        {str(name): [str(digest) for digest in digests] for name, digests in values["checksums"].items()},
        None if index is None else IndexRecord(**index),
        tuple(Source(**source) for source in values["sources"]),
    )
    if manifest.index is not None and not re.fullmatch(r"index-\d+\.faiss", manifest.index.file):
        raise ValueError(f"its index is {manifest.index.file!r}")
    return manifest
