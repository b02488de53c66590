"""What is done to whole datastores: several copied into one, and one copied into a safetensors file. In bounded memory."""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.datastore.entry_files import columns
from mbpa_lm.memory.datastore.exact import rows_at_once
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.system.durable import replacing

SAFETENSORS_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int32": "I32"}


def check_alike(stores: Sequence[Datastore]) -> None:
    """Raise DatastoreError where stores are not of one model, tokenizer and layout."""
    first = stores[0]
    for other in stores[1:]:
        for what in ("identity", "layout"):
            one, two = getattr(first.manifest, what), getattr(other.manifest, what)
            if one != two:
                name = next(name for name in vars(one) if getattr(one, name) != getattr(two, name))
                raise DatastoreError(
                    f"{first.folder} and {other.folder} cannot be one memory: {name} is {str(getattr(one, name))[:12]} in the "
                    f"first and {str(getattr(two, name))[:12]} in the other"
                )


def check_whole(store: Datastore) -> None:
    """Raise DatastoreError where a text is half read: nobody could go on with it in a copy."""
    sources = store.manifest.sources
    if sources and len(store) < sources[-1].first_entry + sources[-1].entries:
        raise DatastoreError(f"{store.folder} holds only a part of {sources[-1].name}; finish that build first")


def append_store(target: Datastore, source: Datastore, on_progress: Callable[[int], None]) -> None:
    """Add all entries of a store to another one, its documents and texts as new ones."""
    first_entry, first_document = len(target), target.manifest.documents
    sources = [
        replace(each, first_entry=each.first_entry + first_entry, first_document=each.first_document + first_document)
        for each in source.manifest.sources
    ]
    at_once = rows_at_once(source.manifest.layout.hidden_size)
    for begin in range(0, len(source), at_once):
        end = min(begin + at_once, len(source))
        entries, documents = source.entries_between(begin, end)
        begun = [each for each in sources if begin <= each.first_entry - first_entry < end]
        target.add(entries, documents + first_document, *begun)
        on_progress(end)


def export(store: Datastore, path: Path, on_progress: Callable[[int], None]) -> None:
    """Write the columns as tensors into one new safetensors file, whole or not at all.

    The file is written as the format is defined: the header's length, the header, the tensors' bytes one behind the other.
    Raises DatastoreError where it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"model": store.manifest.identity.model, "metric": "squared euclidean"}}
    offset, count = 0, len(store)
    of_layout = columns(store.manifest.layout)
    for name, column in of_layout.items():
        size = count * column.row_bytes
        dtype = SAFETENSORS_TYPES[str(column.stored).removeprefix("torch.")]
        shape = [count] if column.width == 1 else [count, column.width]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    at_once = rows_at_once(store.manifest.layout.hidden_size)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if path.is_file():
        raise DatastoreError(f"{path} is there already; name another file")
    if not path.name or path.is_dir():
        raise DatastoreError(f"{path} is no file; name one that ends in .safetensors")
    if path.resolve().parent == store.folder.resolve():
        raise DatastoreError(f"{path} lies in the memory itself; name a file somewhere else")
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for number, (name, column) in enumerate(of_layout.items()):
                for begin in range(0, count, at_once):
                    end = min(begin + at_once, count)
                    file.write(column.encode(store.column_between(name, begin, end)))
                    on_progress((number * count + end) // len(of_layout))
    except OSError as error:
        raise DatastoreError(f"{path} could not be written: {reason(error)}") from None
