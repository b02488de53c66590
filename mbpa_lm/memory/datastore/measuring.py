"""Candidates of a search measured against the stored keys, and the nearest of them read.

Dimensions: `C` queries, `n` candidates, `K` neighbours, `d` hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.datastore.entry_files import EntryFiles
from mbpa_lm.memory.datastore.measuring_compiled import fill_in_measured

NUMBERS_AT_ONCE = 1 << 20
"""Of keys that are measured at once: as many as stay in a processor's cache."""


def nearest_entries(files: EntryFiles, candidates_Cn: Tensor, queries_Cd: Tensor, count: int) -> Neighbours:
    """Return the nearest K of the entries in given rows, -1 for none; nearest first, the newer first among equals.

    Distances are squared Euclidean, in single precision. Fewer candidates than K leave places empty.
    """
    missing = max(0, count - candidates_Cn.shape[1])
    rows_Cn = torch.nn.functional.pad(candidates_Cn, (0, missing), value=-1)
    queries_at_once = max(1, NUMBERS_AT_ONCE // max(1, rows_Cn.shape[1] * queries_Cd.shape[1]))
    pairs = zip(rows_Cn.split(queries_at_once), queries_Cd.split(queries_at_once), strict=True)
    return Neighbours.joined([_nearest_of_some(files, rows, queries, count) for rows, queries in pairs])


def read_entries(read: Callable[[str], Tensor], likely_words: int, keys: Tensor | None = None) -> Entries:
    """Return entries from columns (..., width) that `read` gives by their names, and the keys if they are at hand."""
    keys = read("keys") if keys is None else keys
    nothing = keys.new_empty(*keys.shape[:-1], 0)
    return Entries(
        keys,
        read("values")[..., 0].long(),
        read("log_partitions")[..., 0],
        read("likely_words") if likely_words else nothing.int(),
        read("likely_probabilities") if likely_words else nothing,
    )


def nearest_candidates(keys_Cnd: Tensor, rows_Cn: Tensor, queries_Cd: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (C, K), distances (C, K), and places (C, K) among the candidates, of the nearest; on a CPU.

    Args: keys of the candidates, and the rows that say which is newer, -1 for none; there must be K candidates.
    """
    rows_CK, places_CK = torch.empty(2, len(rows_Cn), count, dtype=torch.int64)
    distances_CK = torch.empty(len(rows_Cn), count)
    arrays = (keys_Cnd.float(), queries_Cd.float().contiguous(), rows_Cn, rows_CK, distances_CK, places_CK)
    fill_in_measured(*(array.numpy() for array in arrays))
    return rows_CK, distances_CK, places_CK


def _nearest_of_some(files: EntryFiles, rows_Cn: Tensor, queries_Cd: Tensor, count: int) -> Neighbours:
    keys_Cnd = _read(files, "keys", rows_Cn)
    rows_CK, distances_CK, places_CK = nearest_candidates(keys_Cnd, rows_Cn, queries_Cd.detach().cpu(), count)
    empty_CK = rows_CK < 0
    any_empty = bool(empty_CK.any())

    def at_rows(name: str) -> Tensor:
        found = _read(files, name, rows_CK)
        return found.masked_fill_(empty_CK[..., None], 0) if any_empty else found

    flat = (places_CK + rows_Cn.shape[1] * torch.arange(len(rows_CK))[:, None]).flatten()
    keys_CKd = keys_Cnd.flatten(0, 1).index_select(0, flat).view(*rows_CK.shape, -1)
    keys_CKd = keys_CKd.masked_fill_(empty_CK[..., None], 0) if any_empty else keys_CKd
    entries = read_entries(at_rows, files.layout.likely_words, keys_CKd)
    device = queries_Cd.device
    on_device = Entries(*(tensor.to(device) for tensor in entries.tensors()))
    return Neighbours(on_device, distances_CK.to(device), rows_CK.to(device))


def _read(files: EntryFiles, name: str, rows: Tensor) -> Tensor:
    """Return what a column has in the given rows; anything where a row is -1."""
    return files.rows(name, rows.clamp(min=0).flatten().numpy()).view(*rows.shape, -1)
