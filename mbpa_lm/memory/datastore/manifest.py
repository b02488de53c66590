"""The manifest of a datastore: what it is, how many entries are acknowledged, and the checksums of all files.

It is replaced whole, and carries its own checksum; what it does not count does not exist.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.system.durable import read_json, replace_json, sealed, unsealed

FORMAT = 1
FILE = "manifest.json"
MOST_NUMBERS, MOST_ENTRIES = 1 << 16, 1 << 48
"""Of a key, and of a memory: what is larger is no memory."""
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
    by_hand: bool = False  # whether the kind was asked for, and is to stay


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
    keys_from: int = 0  # the keys of entries before this one are in the index alone


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest; it is on disk when this returns. Raises OSError where it cannot be."""
    values = {"format": FORMAT, "metric": "squared euclidean", **dataclasses.asdict(manifest)}
    replace_json(folder / FILE, sealed(values))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest; raises DatastoreError where there is none, or a damaged one."""
    path = folder / FILE
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists():
            advice = f"put its {FILE} back, if it was one, or name the folder that mbpa-memory build wrote"
        else:
            advice = f"make one with mbpa-memory build --output {folder}"
        raise DatastoreError(f"{folder} holds no memory; {advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DatastoreError(f"{path} cannot be read ({reason(error)}); put it back, or build the memory again") from None
    try:
        if values["format"] != FORMAT:
            raise DatastoreError(f"{folder} is a memory of format {values['format']}; this version reads format {FORMAT}")
        return _parse(unsealed(values))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatastoreError(f"{path} is damaged ({reason(error)}); put it back, or build the memory again") from None


def check_identity(
    place: object,
    found: Identity,
    wanted: Identity,
    advice: str = "build another one, in another folder, with mbpa-memory build",
) -> None:
    """Refuse a memory of another model or tokenizer, showing both fingerprints."""
    for what in ("model", "tokenizer"):
        one, other = getattr(found, what), getattr(wanted, what)
        if one != other:
            raise DatastoreError(
                f"the memory in {place} was written with {what} {one[:12]}, this {what} is {other[:12]}; {advice}"
            )


def _parse(values: dict[str, Any]) -> Manifest:
    index = values["index"]
    manifest = Manifest(
        Identity(**values["identity"]),
        Layout(**values["layout"]),
        values["entries"],
        values["documents"],
        {str(name): [str(digest) for digest in digests] for name, digests in values["checksums"].items()},
        None if index is None else IndexRecord(**index),
        tuple(Source(**source) for source in values["sources"]),
        values.get("keys_from", 0),
    )
    identity, layout, record = manifest.identity, manifest.layout, manifest.index
    _require(isinstance(identity.model, str) and isinstance(identity.tokenizer, str), "identity")
    _require(layout.key_type in get_args(KeyType), "key_type")
    _require(_is_count(layout.hidden_size, MOST_NUMBERS) and layout.hidden_size > 0, "hidden_size")
    _require(_is_count(layout.likely_words, MOST_NUMBERS), "likely_words")
    _require(_is_count(manifest.entries) and _is_count(manifest.documents), "entries")
    _require(_is_count(manifest.keys_from, 0 if record is None else record.entries), "keys_from")
    for source in manifest.sources:
        _require(isinstance(source.name, str) and isinstance(source.fingerprint, str), "sources")
        _require(all(map(_is_count, (source.first_entry, source.first_document, source.entries))), "sources")
    if record is not None:
        _require(re.fullmatch(r"index-\d{1,9}\.faiss", str(record.file)) is not None, "index file")
        _require(record.kind in get_args(IndexKind) and record.kind != "flat", "index kind")
        _require(_is_count(record.entries, manifest.entries) and record.entries > 0, "index entries")
        effort = record.search["effort"]
        _require(_is_count(effort, max(record.entries, record.search["cells"], 64)) and effort > 0, "index effort")
        _require(all(isinstance(record.recall[name], int | float) for name in ("at", "recall")), "index recall")
    return manifest


def _is_count(value: object, most: int = MOST_ENTRIES) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"its {what} is impossible")
