"""What `mbpa-memory` does: memories built from texts, added to, indexed, described, checked, joined and copied out."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mbpa_lm.checkpoints.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from mbpa_lm.checkpoints.pretrained import pretrained_checkpoint
from mbpa_lm.config import Config
from mbpa_lm.data.streams import open_stream
from mbpa_lm.data.text_files import WholeText
from mbpa_lm.errors import DatastoreError, reason
from mbpa_lm.memory.datastore.entry_files import columns
from mbpa_lm.memory.datastore.maintenance import append_store, check_alike, check_whole, export
from mbpa_lm.memory.datastore.manifest import FILE, IndexKind, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.remembering.datastores import GIB, build, build_index, identity_of, likely_words_kept, limit_of
from mbpa_lm.remembering.remember import Text
from mbpa_lm.remembering.training_text import training_text
from mbpa_lm.system.durable import hold
from mbpa_lm.system.machine import peak_memory_bytes, pick_device
from mbpa_lm.system.progress import ProgressBar, console, counted, token_progress


def build_memory(config: Config, checkpoint_path: Path | None, folder: Path, text_path: Path | None) -> None:
    """Write a text, or the training text, into a new memory, or go on with one that was interrupted.

    Without a checkpoint, it is the memory of the model that `model.pretrained` names.
    Raises CheckpointError and DataError where model or text cannot be read, DatastoreError where the memory cannot be written,
    or holds another text.
    """
    checkpoint = _load(config, checkpoint_path, text_path is None)
    text = training_text(config, checkpoint) if text_path is None else _read(config, checkpoint, text_path)
    layout = Layout(checkpoint.model.hidden_size, likely_words_kept(config, checkpoint), config.memory.key_type)
    if not _is_there(folder):
        Datastore.create(folder, identity_of(checkpoint), layout).close()
    with _open_to_write(config, checkpoint, folder) as store:
        if store.manifest.layout != layout:
            found, wanted = asdict(store.manifest.layout), asdict(layout)
            name = next(name for name in found if found[name] != wanted[name])
            raise DatastoreError(f"{folder} was begun with {name} {found[name]}, not {wanted[name]}; name another folder")
        if any(source.fingerprint != text.fingerprint for source in store.manifest.sources):
            raise DatastoreError(f"{folder} holds {store.manifest.sources[0].name} already; use mbpa-memory add for more text")
        build(store, checkpoint.model, text, config.memory)
    show_memory(folder)
    _show_peak()


def add_to_memory(config: Config, checkpoint_path: Path | None, folder: Path, text_path: Path) -> None:
    """Write a text into a memory that there is, or go on with it; raises what `build_memory` does."""
    checkpoint = _load(config, checkpoint_path, False)
    with _open_to_write(config, checkpoint, folder) as store:
        build(store, checkpoint.model, _read(config, checkpoint, text_path), config.memory)
    show_memory(folder)
    _show_peak()


def index_memory(folder: Path, kind: IndexKind | None, resident_gib: float = 0) -> None:
    """Make the index of a memory again, under a limit of resident memory; raises DatastoreError where it cannot be."""
    with Datastore.open(folder, memory_limit=int(resident_gib * GIB), writable=True) as store:
        build_index(store, kind)
    show_memory(folder)


def compact_memory(folder: Path) -> None:
    """Keep a memory's keys in its index alone; raises DatastoreError where there is none."""
    with Datastore.open(folder, writable=True) as store:
        if store.manifest.index is not None and store.manifest.index.entries < len(store):
            build_index(store, None)
        store.give_up_keys()
    show_memory(folder)


def show_memory(folder: Path) -> None:
    """Print what a memory is; raises DatastoreError where it is damaged."""
    store = Datastore.open(folder)
    manifest, layout = store.manifest, store.manifest.layout
    in_columns = sum((folder / column.file).stat().st_size for column in columns(layout).values())
    index, index_bytes = manifest.index, 0 if manifest.index is None else manifest.index.bytes
    table = Table(show_header=False, box=None)
    for name, value in (
        ("entries", f"{len(store):,} in {counted(manifest.documents, 'document')}"),
        ("keys", f"{layout.hidden_size} numbers of {layout.key_type}, squared Euclidean distance"),
        ("likely words", f"{layout.likely_words} an entry"),
        ("size", f"{_size(in_columns + index_bytes)}, {in_columns / max(1, len(store)):,.0f} bytes an entry beside the index"),
        ("model", manifest.identity.model[:12]),
        ("tokenizer", manifest.identity.tokenizer[:12]),
    ):
        table.add_row(name, value)
    if manifest.keys_from:
        table.add_row("", f"the first {manifest.keys_from:,} are in the index alone")
    if index is None:
        table.add_row("index", "none: every entry is measured")
    else:
        found = f"finds {index.recall['recall']:.1%} of the {index.recall['at']:.0f} nearest"
        table.add_row("index", f"{index.kind} over {index.entries:,} entries, {_size(index.bytes)}, {found}")
    ends = [*(source.first_entry for source in manifest.sources[1:]), len(store)]
    for source, end in zip(manifest.sources, ends, strict=True):
        there = min(source.entries, end - source.first_entry)
        table.add_row("text", escape(f"{source.name}: {there:,} of {source.entries:,} entries"))
    console.print(f"memory {folder}", markup=False)
    console.print(table)


def verify_memory(folder: Path) -> None:
    """Read everything; raises DatastoreError naming the file and the entries that are not what was written."""
    store = Datastore.open(folder, unchecked=True)
    with ProgressBar("verifying", None, "bytes") as progress:
        done = 0

        def show(size: int) -> None:
            nonlocal done
            done += size
            progress.reach(done)

        damaged = store.damaged(show)
    if damaged is not None:
        raise DatastoreError(f"{folder / damaged} is not what was written; put the file back, or build the memory again")
    console.print(f"{folder}: {len(store):,} entries, {_size(done)}, all as they were written", markup=False)


def merge_memories(folders: Sequence[Path], output: Path, resident_gib: float = 0) -> None:
    """Copy memories into a new one, one behind the other, and index it; raises DatastoreError where they do not fit.

    The new memory has its name when it is whole.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DatastoreError("a memory is named more than once; name it once")
    limit = int(resident_gib * GIB)
    stores = [Datastore.open(folder, memory_limit=limit) for folder in folders]
    check_alike(stores)
    for store in stores:
        check_whole(store)
    temporary, lock_path = (output.with_name(f".{output.name}.{name}") for name in ("merging", "lock"))
    with contextlib.suppress(OSError):  # said by the next line
        output.parent.mkdir(parents=True, exist_ok=True)
    lock = hold(lock_path, output)
    try:
        if output.exists():
            raise DatastoreError(f"{output} is there already; name another folder")
        shutil.rmtree(temporary, ignore_errors=True)
        with Datastore.create(temporary, stores[0].manifest.identity, stores[0].manifest.layout, limit) as target:
            for store in stores:
                with ProgressBar(f"copying {store.folder}", len(store), "entries") as progress:
                    append_store(target, store, progress.reach)
            if target.needs_index():
                build_index(target, None)
        os.replace(temporary, output)
    except OSError as error:
        raise DatastoreError(f"{output} could not be written: {reason(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        os.close(lock)
    show_memory(output)


def export_memory(folder: Path, path: Path) -> None:
    """Copy a memory's entries into a safetensors file; raises DatastoreError where it cannot be written."""
    store = Datastore.open(folder)
    with ProgressBar(f"writing {path}", len(store), "entries") as progress:
        export(store, path, progress.reach)
    console.print(f"written to {path}: {_size(path.stat().st_size)}", markup=False)


def _load(config: Config, path: Path | None, needs_training_text: bool) -> Checkpoint:
    if path is None:
        return pretrained_checkpoint(config, needs_training_text)
    checkpoint = load_checkpoint(find_checkpoint(path))
    checkpoint.model.to(pick_device(config.run.device)).eval()
    return checkpoint


def _read(config: Config, checkpoint: Checkpoint, path: Path) -> Text:
    text = WholeText(path, config.data.document_pattern)
    with token_progress(f"tokenizing {text.name}") as progress:
        stream = open_stream(text, "text", checkpoint.tokenizer, Path(config.data.token_folder), progress)
    apart = config.model.pretrained is not None  # such a model meets a document without any other before it
    return Text(text.name, text.fingerprint("text"), stream.tokens, stream.document_starts, apart)


def _is_there(folder: Path) -> bool:
    try:
        return (folder / FILE).is_file()
    except OSError as error:
        raise DatastoreError(f"{folder} cannot be read: {reason(error)}") from None


def _open_to_write(config: Config, checkpoint: Checkpoint, folder: Path) -> Datastore:
    return Datastore.open(folder, identity_of(checkpoint), limit_of(config.memory), writable=True)


def _show_peak() -> None:
    console.print(f"this took at most {peak_memory_bytes() / GIB:.2f} GiB of resident memory")


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
