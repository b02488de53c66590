"""The datastores that a configuration names: opened, or, of the training text, built where they are not kept."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from weakref import WeakValueDictionary

from mbpa_lm.checkpoints.checkpoint import Checkpoint
from mbpa_lm.config import Config, MemoryConfig
from mbpa_lm.errors import DatastoreError
from mbpa_lm.memory.datastore.manifest import FILE, Identity, IndexKind, Layout, read_manifest
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.models.base import LanguageModel
from mbpa_lm.remembering.remember import Text, remember
from mbpa_lm.system.durable import hold
from mbpa_lm.system.progress import ProgressBar

TRAINING = "training"
FOLDER, LOCK = "datastore", ".datastore.lock"
GIB = 1 << 30
_OPEN: WeakValueDictionary[tuple[Path, int, str], Datastore] = WeakValueDictionary()


def identity_of(checkpoint: Checkpoint) -> Identity:
    """Return whose hidden states a checkpoint's are."""
    return Identity(checkpoint.fingerprint, checkpoint.tokenizer.fingerprint())


def likely_words_kept(config: Config, checkpoint: Checkpoint) -> int:
    """Return how many likely words an entry keeps: none where the solver does not need them."""
    kept = min(config.memory.likely_words, checkpoint.model.vocabulary_size)
    return kept if config.adaptation.solver == "restricted" else 0


def limit_of(memory: MemoryConfig) -> int:
    """Return the limit of resident memory in bytes, 0 for none."""
    return int(memory.resident_gib * GIB)


def open_one(config: Config, checkpoint: Checkpoint, folder: Path) -> Datastore:
    """Open a store to be searched; where it is open already, as it is now and for the same use, return that one.

    Raises DatastoreError where it is missing, damaged, or of another model.
    """
    use = (folder.resolve(), limit_of(config.memory), config.memory.gpus)
    store = _OPEN.get(use)
    if store is None or store.manifest != read_manifest(folder) or store.manifest.identity != identity_of(checkpoint):
        store = Datastore.open(
            folder,
            identity_of(checkpoint),
            limit_of(config.memory),
            gpus=config.memory.gpus,
            vocabulary_size=checkpoint.model.vocabulary_size,
        )
        _OPEN[use] = store
    return store


def open_datastores(config: Config, checkpoint: Checkpoint, training_text: Callable[[], Text]) -> list[Datastore]:
    """Open the stores that memory.datastores names, to be searched together with the window.

    Raises DatastoreError where one is missing, damaged, of another model, or keeps another number of likely words.
    """
    wanted, stores = likely_words_kept(config, checkpoint), []
    _refuse_twice(config, checkpoint)
    for name in config.memory.datastores:
        if name == TRAINING:
            store = training_datastore(config, checkpoint, training_text)
        else:
            store = open_one(config, checkpoint, Path(name))
        if store.likely_words != wanted:
            raise DatastoreError(
                f"the memory in {store.folder} keeps {store.likely_words} likely words an entry, memory.likely_words asks for "
                f"{wanted}; change that, or build another one with mbpa-memory build --memory.likely_words {wanted}"
            )
        stores.append(store)
    return stores


def _refuse_twice(config: Config, checkpoint: Checkpoint) -> None:
    """Raise DatastoreError where a memory is named twice: each of its entries would count twice."""
    training = checkpoint.folder / FOLDER
    paths = [(training if name == TRAINING else Path(name)).resolve() for name in config.memory.datastores]
    for name, path in zip(config.memory.datastores, paths, strict=True):
        if paths.count(path) > 1:
            raise DatastoreError(f"memory.datastores names {name} more than once; name it once")


def knows(config: Config, fingerprint: str) -> list[str]:
    """Return which of the datastores that memory.datastores names have read the text of a fingerprint."""
    folders = [name for name in config.memory.datastores if name != TRAINING]
    return [name for name in folders if any(each.fingerprint == fingerprint for each in read_manifest(Path(name)).sources)]


def training_datastore(config: Config, checkpoint: Checkpoint, training_text: Callable[[], Text]) -> Datastore:
    """Return the store of the training text that is kept with the checkpoint; it is built, or built further, if it must be.

    Args: training_text opens the text when it is needed. Raises DatastoreError where the store cannot be written.
    """
    folder, identity, memory = checkpoint.folder / FOLDER, identity_of(checkpoint), config.memory
    likely_words = likely_words_kept(config, checkpoint) if TRAINING in memory.datastores else 0
    kept = _ready(folder, checkpoint, config, likely_words)
    if kept is not None:
        return kept
    try:
        lock = hold(checkpoint.folder / LOCK, folder)  # not in the folder itself, which may be replaced
    except DatastoreError as error:
        if checkpoint.folder.is_dir() and os.access(checkpoint.folder, os.W_OK):
            raise
        raise DatastoreError(f"{error}; the memory of the training text is kept there: evaluate a copy of the run") from None
    try:
        layout, limit = Layout(checkpoint.model.hidden_size, likely_words, memory.key_type), limit_of(memory)
        text = training_text()
        tokens = text.tokens[: config.knn.entries + 1] if config.knn.entries else text.tokens
        text = text._replace(name=_name(config), tokens=tokens)
        if not _can_go_on(folder, layout, text):
            _remove(folder)
            Datastore.create(folder, identity, layout, limit).close()
        with Datastore.open(folder, identity, limit, writable=True, gpus=memory.gpus) as store:
            build(store, checkpoint.model, text, memory)
        return open_one(config, checkpoint, folder)
    finally:
        os.close(lock)


def _name(config: Config) -> str:
    return f"the first {config.knn.entries:,} words of the training text" if config.knn.entries else "the training text"


def _ready(folder: Path, checkpoint: Checkpoint, config: Config, likely_words: int) -> Datastore | None:
    """Return the kept store where it is whole and of these settings; more likely words than are needed do no harm."""
    if not (folder / FILE).is_file():
        return None
    store = open_one(config, checkpoint, folder)
    sources, layout = store.manifest.sources, store.manifest.layout
    is_of_this = len(sources) == 1 and sources[0].name == _name(config) and layout.key_type == config.memory.key_type
    is_whole = is_of_this and len(store) == sources[0].entries and not store.needs_index(index_kind(config.memory))
    return store if is_whole and likely_words in (0, layout.likely_words) else None


def _can_go_on(folder: Path, layout: Layout, text: Text) -> bool:
    """Say whether a store holds a part of just this text, or nothing yet."""
    if not (folder / FILE).is_file():
        return False
    manifest = read_manifest(folder)
    found = [(each.name, each.fingerprint, each.entries) for each in manifest.sources]
    return manifest.layout == layout and found in ([], [(text.name, text.fingerprint, text.entries)])


def _remove(folder: Path) -> None:
    """Remove a store so that, whenever that is interrupted, nobody takes the rest for one."""
    (folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def index_kind(memory: MemoryConfig) -> IndexKind | None:
    """Return the configured index, None where the size is to choose it."""
    return None if memory.index == "auto" else memory.index


def build(store: Datastore, model: LanguageModel, text: Text, memory: MemoryConfig) -> None:
    """Add a text to a store and index it, with progress on the terminal."""
    with ProgressBar(f"remembering {text.name}", text.entries, "entries") as progress:
        remember(store, model, text, progress.reach)
    if store.needs_index(index_kind(memory)):
        build_index(store, index_kind(memory))


def build_index(store: Datastore, kind: IndexKind | None) -> None:
    """Index a store, with progress on the terminal."""
    with ExitStack() as bars:
        shown: dict[str, ProgressBar] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in shown:
                bars.close()
                shown[what] = bars.enter_context(ProgressBar(what, total, "steps" if total < 100 else "entries"))
            shown[what].reach(done)

        store.build_index(kind, show)
