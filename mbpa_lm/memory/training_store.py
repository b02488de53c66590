"""The hidden states of a whole text with the tokens that followed, searched approximately: the datastore of kNN-LM.

Built once a checkpoint and kept with it. Small texts are searched exactly; larger ones by an inverted file of keys in half
precision (FAISS), in which a query looks into the cells nearest to it.

Dimensions: `N` entries, `C` queries, `K` neighbours, `d` hidden size.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from mbpa_lm.errors import RunFolderError, reason
from mbpa_lm.models.base import LanguageModel, State

INDEX_FILE, VALUES_FILE, SETTINGS_FILE = "datastore.faiss", "datastore.values.bin", "datastore.json"
EXACT_UP_TO = 20_000
"""Entries up to which the search is exact."""
PER_CELL = 256
"""Entries a cell holds on average."""
TRAINED_ON_PER_CELL = 40
CHUNK = 1024


@dataclass(frozen=True)
class TrainingStore:
    """An index over N keys and the token that followed each."""

    index: Any  # faiss.Index of squared Euclidean distances
    values_N: np.ndarray  # (N,) unsigned integers

    def nearest(self, queries_Cd: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return squared distances (C, K), inf where fewer than K were found, and the tokens (C, K) that followed."""
        distances_CK, rows_CK = self.index.search(queries_Cd.float().cpu().numpy(), count)
        missing_CK = rows_CK < 0
        values_CK = self.values_N[np.where(missing_CK, 0, rows_CK)].astype(np.int64)
        distances_CK = np.where(missing_CK, np.inf, np.maximum(distances_CK, 0))
        device = queries_Cd.device
        return torch.from_numpy(distances_CK).to(device, torch.float32), torch.from_numpy(values_CK).to(device)


def training_store(
    folder: Path,
    model: LanguageModel,
    text: Callable[[], np.ndarray],
    entries: int,
    cells_searched: int,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> TrainingStore:
    """Return the store kept in the checkpoint's folder, and build and keep it where there is none of the same settings.

    Args: text opens the tokens when they are needed; entries: the first so many are stored, 0 for all. Raises RunFolderError
    where it cannot be written or read.
    """
    settings = {"entries": entries, "d": model.hidden_size}
    if not _is_kept(folder, settings):
        _build(folder, model, text(), settings, on_progress)
    try:
        index = faiss.read_index(str(folder / INDEX_FILE))
    except RuntimeError as error:
        raise RunFolderError(
            f"{folder / INDEX_FILE} cannot be read: {reason(error)}; delete it, to have it made again"
        ) from None
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = cells_searched
    return TrainingStore(index, np.fromfile(folder / VALUES_FILE, dtype=np.uint32))


def _is_kept(folder: Path, settings: dict[str, int]) -> bool:
    try:
        kept = json.loads((folder / SETTINGS_FILE).read_text())
        return bool(kept == {**settings, "bytes": _sizes(folder)})
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in (INDEX_FILE, VALUES_FILE)}


def _build(
    folder: Path, model: LanguageModel, tokens: np.ndarray, settings: dict[str, int], on_progress: Callable[[int], None]
) -> None:
    tokens = tokens[: settings["entries"] + 1] if settings["entries"] else tokens
    count = len(tokens) - 1
    index = _empty_index(count, model.hidden_size)
    if not index.is_trained:
        wanted = index.nlist * TRAINED_ON_PER_CELL
        pieces = list(_hidden_states(model, tokens[: min(count, 2 * wanted) + 1]))
        index.train(np.concatenate(pieces)[:: max(1, min(count, 2 * wanted) // wanted)])
    done = 0
    for keys in _hidden_states(model, tokens):
        index.add(keys)
        done += len(keys)
        on_progress(done)
    try:
        (folder / SETTINGS_FILE).unlink(missing_ok=True)  # what says that the other files are whole goes first, and comes last
        for name, write in (
            (INDEX_FILE, lambda path: faiss.write_index(index, str(path))),
            (VALUES_FILE, lambda path: tokens[1:].astype(np.uint32).tofile(path)),
            (SETTINGS_FILE, lambda path: path.write_text(json.dumps({**settings, "bytes": _sizes(folder)}))),
        ):
            temporary = folder / f".{name}.{os.getpid()}"
            write(temporary)
            os.replace(temporary, folder / name)
    except (OSError, RuntimeError) as error:
        raise RunFolderError(f"the datastore could not be written to {folder}: {reason(error)}") from None


def _empty_index(count: int, d: int) -> Any:
    if count <= EXACT_UP_TO:
        return faiss.IndexFlatL2(d)
    cells = max(1, count // PER_CELL)
    return faiss.index_factory(d, f"IVF{cells},SQfp16", faiss.METRIC_L2)


@torch.no_grad()
def _hidden_states(model: LanguageModel, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Read the tokens but the last, in pieces, and give the hidden state after each."""
    device = model.output_layer().weight.device
    state: State | None = None
    for begin in range(0, len(tokens) - 1, CHUNK):
        read = torch.from_numpy(tokens[begin : min(begin + CHUNK, len(tokens) - 1)].astype(np.int64)).to(device)
        output = model(read[None], state)
        state = output.state
        yield output.hidden_states[0].float().cpu().numpy()
