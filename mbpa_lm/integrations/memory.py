"""The memory of a causal language model of transformers: documents that were added, and what it reads meanwhile.

    memory = mbpa_lm.Memory(model, tokenizer)
    memory.add_documents(["The new pump is called Aquila.", ...])
    memory.save("memories/pumps")

Documents lie in a datastore on disk, in a folder of their own that is deleted with the memory unless it is saved. What the
model reads is remembered in a window, one for all rows of a batch or one for each.
"""

import hashlib
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.checkpoints.scales import ALPHA, TOKENS, measure_norm
from mbpa_lm.config import AdaptationConfig, MemoryConfig
from mbpa_lm.config.checks import check_types
from mbpa_lm.data.tokenizers import HuggingFaceTokenizer
from mbpa_lm.errors import DAMAGES, ConfigError, DatastoreError, ModelError, did_you_mean, reason
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.integrations.arguments import check_parts, check_text, listed
from mbpa_lm.memory.base import Entries
from mbpa_lm.memory.composite import CompositeMemory
from mbpa_lm.memory.datastore.manifest import Identity, Layout
from mbpa_lm.memory.datastore.store import Datastore
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.fingerprint import model_fingerprint
from mbpa_lm.models.head import in_evaluation, positions_of
from mbpa_lm.models.pretrained import LONGEST_CONTEXT
from mbpa_lm.models.transformer import TransformerLanguageModel
from mbpa_lm.remembering.datastores import build, index_kind, limit_of
from mbpa_lm.remembering.remember import Text
from mbpa_lm.system.durable import read_json, replace_json, sealed, unsealed

Rows = Literal["shared", "own"]
SETTINGS = "settings.json"
TOKENS_WITHOUT_TEXT = 256
"""Tokens on which the size of hidden states is measured where there is no document yet."""
OF_MEMORY = ("size", "neighbours", "likely_words", "key_type", "index", "resident_gib", "gpus")
OF_ADAPTATION = tuple(field.name for field in fields(AdaptationConfig) if field.name != "weight")
SETTING_NAMES = (*OF_MEMORY, *OF_ADAPTATION)
"""Settings of a memory, by the names that they have in MemoryConfig and AdaptationConfig."""


class Memory:
    """What a model remembers, and how it is adapted to it."""

    def __init__(self, model: Any, tokenizer: Any | None = None, *, rows: Rows = "shared", **settings: Any) -> None:
        """Make an empty one.

        Args: tokenizer of the model, needed where documents are given as text; rows: whether the rows of a batch share what is
        read, or each remembers its own until its text ends; settings: those of the sections `memory` and `adaptation` of a
        configuration, such as size, neighbours, alpha and steps. Raises ModelError for a model that cannot have a memory,
        ConfigError for a setting that does not exist or is impossible.
        """
        if rows not in get_args(Rows):
            raise ConfigError(f"rows is {rows!r}, but must be one of {', '.join(get_args(Rows))}")
        check_parts(model, tokenizer)
        if "generate" in vars(model):
            raise ModelError(f"this {type(model).__name__} is adapted now; make its memory before the with block")
        self.rows = rows
        self.tokenizer = tokenizer
        self._settings = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
        memory, adaptation = _configured(self._settings)
        context = min(positions_of(model) or LONGEST_CONTEXT, LONGEST_CONTEXT)
        with in_evaluation(model):
            self.language_model = TransformerLanguageModel(model, context, context // 2)
        self.language_model.training = False  # the model in it stays as it is
        self.identity = Identity(model_fingerprint(model), _fingerprint_of(tokenizer))
        self._norm: float | None = None
        self._adaptation = adaptation
        self._expert: MbpaExpert | None = None
        self.config = replace(memory, likely_words=min(memory.likely_words, self.language_model.vocabulary_size))
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder: Path | None = None
        self._store: Datastore | None = None
        self._streams: dict[int, WindowMemory] = {}

    @classmethod
    def load(
        cls, folder: str | Path, model: Any, tokenizer: Any | None = None, *, rows: Rows | None = None, **settings: Any
    ) -> Self:
        """Open one that was saved, or made by `mbpa-memory build`; more documents can be added.

        Args: rows, None for what was saved; settings that replace those that were saved with it. Raises DatastoreError where
        it is missing, damaged, or of another model or tokenizer.
        """
        if not isinstance(folder, str | Path):
            raise DatastoreError(
                f"a memory is loaded from a folder, and this is a {type(folder).__name__}: load(folder, model)"
            )
        path = Path(folder)
        try:
            saved = unsealed(read_json(path / SETTINGS)) if (path / SETTINGS).is_file() else {}
            kept, norm = dict(saved.get("settings", {})), saved.get("mean_squared_norm")
            if norm is not None and not 0 < norm < math.inf:
                raise ValueError(f"mean_squared_norm is {norm}")
        except DAMAGES as error:
            raise DatastoreError(f"{path / SETTINGS} cannot be read: {reason(error)}; put it back, or delete it") from None
        memory = cls(model, tokenizer, rows=rows or saved.get("rows", "shared"), **{**kept, **settings})
        memory._open(path)
        memory._norm = norm
        return memory

    def __len__(self) -> int:
        """Return how many entries there are."""
        return (0 if self._store is None else len(self._store)) + sum(map(len, self._streams.values()))

    @property
    def neighbours(self) -> int:
        """Return how many neighbours of each position are retrieved (K)."""
        return self.expert.neighbours

    @property
    def expert(self) -> MbpaExpert:
        """Return what adapts the output layer; its steps are sized when it is first asked for."""
        if self._expert is None:
            adaptation = self._adaptation
            if adaptation.alpha is None:
                adaptation = replace(adaptation, alpha=ALPHA / self._measured_norm())
            self._expert = MbpaExpert(self.language_model.output_layer(), adaptation, self.config.neighbours)
        return self._expert

    def add_documents(self, documents: Sequence[str] | Sequence[Sequence[int]]) -> None:
        """Read each document on its own and remember it; documents that were added together before are not added again.

        They are written into the folder that the memory was loaded from, where there is one. Args: documents as text, or as the
        tokenizer's ids. Raises ConfigError where there is text and no tokenizer, or ids that the model does not know,
        DatastoreError where they cannot be written.
        """
        ids = [each for each in map(self._ids, listed(documents, "add_documents")) if len(each)]
        tokens = np.concatenate([*ids, np.zeros(0, dtype=np.int64)])
        if max(map(len, ids), default=0) < 2:
            return
        self._check_ids(tokens)
        starts = np.cumsum([0, *map(len, ids[:-1])])
        if self._norm is None:
            with in_evaluation(self.language_model):
                self._norm, self._expert = measure_norm(self.language_model, tokens[:TOKENS]), None
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mbpa-memory-")
            self._folder = Path(self._temporary.name) / "memory"
            layout = Layout(self.language_model.hidden_size, self.config.likely_words, self.config.key_type)
            Datastore.create(self._folder, self.identity, layout).close()
        fingerprint = hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest()
        text = Text(f"{len(ids):,} documents", fingerprint, tokens, starts, apart=True)
        opened = Datastore.open(self._folder, self.identity, limit_of(self.config), writable=True)
        with opened as store, in_evaluation(self.language_model):
            build(store, self.language_model, text, self.config)
        self._open(self._folder)

    def window(self, row: int) -> WindowMemory:
        """Return what the text in a row of a batch is read into."""
        place = row if self.rows == "own" else 0
        if place not in self._streams:
            weight = self.language_model.output_layer().weight
            shape = (self.config.size, self.language_model.hidden_size, self.config.likely_words)
            try:
                with torch.inference_mode(False):  # it may outlive the inference mode of the call that makes it
                    self._streams[place] = WindowMemory(*shape, weight.dtype, weight.device)
            except (RuntimeError, MemoryError) as error:
                raise ConfigError(f"there is no room for size={shape[0]:,} entries ({reason(error)}); take fewer") from None
        return self._streams[place]

    def searched(self, row: int) -> CompositeMemory | WindowMemory:
        """Return the same, searched together with the documents."""
        window = self.window(row)
        return window if self._store is None else CompositeMemory(window, self._store)

    def only_keys(self, keys_nd: Tensor, values_n: Tensor) -> Entries:
        """Return entries that ask and are not stored: their other columns hold nothing of use."""
        words = keys_nd.new_empty(len(keys_nd), self.config.likely_words)
        return Entries(keys_nd, values_n, words.new_empty(len(keys_nd), dtype=torch.float32), words.int(), words)

    def forget(self, row: int | None = None) -> None:
        """Forget what was read, of one row or of all; documents stay."""
        for place in list(self._streams) if row is None else [row]:
            self._streams.pop(place, None)

    def save(self, folder: str | Path) -> None:
        """Write documents, and what was read and is still remembered, into a folder, which must be new or that of the memory.

        Raises DatastoreError where it cannot be written; nothing is there then.
        """
        if not isinstance(folder, str | Path) or not str(folder).strip():
            raise DatastoreError(f"a memory is saved into a folder, and {folder!r} names none")
        path = Path(folder)
        layout = Layout(self.language_model.hidden_size, self.config.likely_words, self.config.key_type)
        settings = {"settings": self._settings, "rows": self.rows, "mean_squared_norm": self._measured_norm()}
        if self._folder is not None and path.resolve() == self._folder.resolve():
            target = path
        elif path.exists():
            raise DatastoreError(f"{path} is there already; name another folder")
        else:
            target = path.with_name(f".{path.name}.saving")
        try:
            if target != path:
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                if self._folder is None:
                    Datastore.create(target, self.identity, layout).close()
                else:
                    shutil.copytree(self._folder, target)
            with Datastore.open(target, self.identity, limit_of(self.config), writable=True) as store:
                for window in self._streams.values():
                    store.add(window.entries())
                if store.needs_index(index_kind(self.config)):
                    store.build_index(index_kind(self.config))
            replace_json(target / SETTINGS, sealed(settings))
            if target != path:
                target.rename(path)
        except OSError as error:
            raise DatastoreError(f"{path} could not be written: {reason(error)}") from None
        finally:
            if target != path:
                shutil.rmtree(target, ignore_errors=True)
        self._streams.clear()  # it is among the documents now
        self._open(path)
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _open(self, folder: Path) -> None:
        vocabulary_size = self.language_model.vocabulary_size
        store = Datastore.open(
            folder, self.identity, limit_of(self.config), gpus=self.config.gpus, vocabulary_size=vocabulary_size
        )
        if store.likely_words != self.config.likely_words:
            raise DatastoreError(
                f"the memory in {folder} keeps {store.likely_words} likely words an entry; open it with likely_words="
                f"{store.likely_words}"
            )
        if self._store is not None:
            self._store.close()
        self._folder, self._store = folder, store

    def _check_ids(self, tokens: np.ndarray) -> None:
        known, largest, least = self.language_model.vocabulary_size, int(tokens.max()), int(tokens.min())
        if largest >= known or least < 0:
            raise ConfigError(
                f"the documents hold token {largest if largest >= known else least}, but the model knows {known:,}; take the "
                f"model's own tokenizer"
            )

    def _ids(self, document: str | Sequence[int]) -> np.ndarray:
        if not isinstance(document, str):
            try:
                given = np.asarray(document)
            except (TypeError, ValueError, OverflowError):
                given = np.zeros(())
            if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
                raise ConfigError(
                    f"a document is a {type(document).__name__}, but must be text, or a list of token ids (whole numbers)"
                )
            return given.astype(np.int64)
        if self.tokenizer is None:
            raise ConfigError("documents are given as text, but the memory has no tokenizer: Memory(model, tokenizer)")
        check_text(document)
        found = list(self.tokenizer(document).input_ids)
        end = self.tokenizer.eos_token_id
        if found and end is not None and found[-1] != end:
            found.append(end)
        return np.asarray(found, dtype=np.int64)

    def _measured_norm(self) -> float:
        """Return the mean squared norm of hidden states, on the first documents or, where there are none, on any tokens."""
        if self._norm is None:
            tokens = np.random.default_rng(0).integers(0, self.language_model.vocabulary_size, TOKENS_WITHOUT_TEXT)
            with in_evaluation(self.language_model):
                return measure_norm(self.language_model, tokens)
        return self._norm


def _fingerprint_of(tokenizer: Any | None) -> str:
    """Return what a memory that `mbpa-memory` makes has too."""
    if tokenizer is None:
        return "none"
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has no fast version; take one that has")
    return HuggingFaceTokenizer(tokenizer).fingerprint()


def _configured(settings: dict[str, Any]) -> tuple[MemoryConfig, AdaptationConfig]:
    """Return the sections that settings by their bare names make."""
    for name in settings:
        if name not in SETTING_NAMES:
            raise ConfigError(f"a memory has no setting {name!r}; {did_you_mean(name, SETTING_NAMES)}")
    sections: tuple[tuple[Any, tuple[str, ...]], ...] = ((MemoryConfig, OF_MEMORY), (AdaptationConfig, OF_ADAPTATION))
    made = []
    for section, names in sections:
        values = {name: value for name, value in settings.items() if name in names}
        check_types(section, values)
        made.append(section(**values))
    return made[0], made[1]
