"""Candidates of a search measured against the stored keys, and the nearest of them read.

Dimensions: `C` queries, `n` candidates, `K` neighbours, `d` hidden size.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries, Neighbours
from mbpa_lm.memory.datastore.entry_files import EntryFiles
from mbpa_lm.memory.datastore.measuring_compiled import BFLOAT16, FLOAT16, FLOAT32, fill_in_measured

NUMBER_TYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


def nearest_entries(files: EntryFiles, candidates_Cn: Tensor, queries_Cd: Tensor, count: int) -> Neighbours:
    """Return the nearest K of the entries in given rows, -1 for none; nearest first, the newer first among equals.

    Distances are squared Euclidean, in single precision. Fewer candidates than K leave places empty.
    """
    missing = max(0, count - candidates_Cn.shape[1])
    rows_Cn = torch.nn.functional.pad(candidates_Cn, (0, missing), value=-1)
    at_once = files.rows_within_limit() // max(1, rows_Cn.shape[1]) or 1
    pairs = zip(rows_Cn.split(at_once), queries_Cd.split(at_once), strict=True)
    return Neighbours.joined([_nearest_of_some(files, rows, queries, count) for rows, queries in pairs])


def nearest_candidates(
    keys_Nd: Tensor, places_Cn: Tensor, rows_Cn: Tensor, queries_Cd: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (C, K), distances (C, K), and which of the candidates they are (C, K), of the nearest K; on a CPU.

    Args: keys, finite, and where each candidate's is among them; the rows that say which of equals is the newer, -1 for none.
    """
    rows_CK, kept_CK = torch.empty(2, len(rows_Cn), count, dtype=torch.int64)
    distances_CK = torch.empty(len(rows_Cn), count)
    bits = keys_Nd.view(torch.int32 if keys_Nd.dtype == torch.float32 else torch.int16).numpy()
    unsigned = bits.view(np.uint32 if keys_Nd.dtype == torch.float32 else np.uint16)
    arrays = (queries_Cd.float().contiguous(), places_Cn, rows_Cn, rows_CK, distances_CK, kept_CK)
    fill_in_measured(unsigned, NUMBER_TYPES[keys_Nd.dtype], *(array.numpy() for array in arrays))
    return rows_CK, distances_CK, kept_CK


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


def _nearest_of_some(files: EntryFiles, rows_Cn: Tensor, queries_Cd: Tensor, count: int) -> Neighbours:
    keys_Nd, places_Cn = files.keys_at(rows_Cn)
    rows_CK, distances_CK, kept_CK = nearest_candidates(keys_Nd, places_Cn, rows_Cn, queries_Cd.detach().cpu(), count)
    empty_CK = rows_CK < 0
    any_empty = bool(empty_CK.any())

    def cleared(found: Tensor) -> Tensor:
        found = found.view(*rows_CK.shape, -1)
        return found.masked_fill_(empty_CK[..., None], 0) if any_empty else found

    keys_CKd = cleared(keys_Nd.index_select(0, places_Cn.gather(1, kept_CK).flatten()))
    rows = rows_CK.clamp(min=0).flatten().numpy()
    entries = read_entries(lambda name: cleared(files.rows(name, rows)), files.layout.likely_words, keys_CKd)
    files.keep_to_limit()
    device = queries_Cd.device
    on_device = Entries(*(tensor.to(device) for tensor in entries.tensors()))
    return Neighbours(on_device, distances_CK.to(device), rows_CK.to(device))
