"""Candidates of a search measured against the stored keys, and the nearest of them read.

Dimensions: `C` queries, `n` candidates, `K` neighbours, `d` hidden size, `c` likely words.
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
    rows_Cn = torch.nn.functional.pad(candidates_Cn, (0, missing), value=-1) if missing else candidates_Cn
    at_once = files.queries_at_once(rows_Cn.shape[1])
    if len(rows_Cn) <= at_once:
        return _nearest_of_some(files, rows_Cn, queries_Cd, count)
    pairs = zip(rows_Cn.split(at_once), queries_Cd.split(at_once), strict=True)
    return Neighbours.joined([_nearest_of_some(files, rows, queries, count) for rows, queries in pairs])


def nearest_candidates(
    keys_Nd: Tensor, places_Cn: Tensor, rows_Cn: Tensor, queries_Cd: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (C, K), distances (C, K) and keys (C, K, d) of the nearest K candidates; on a CPU.

    Args: keys, finite, and where each candidate's is among them; the rows that say which of equals is the newer, -1 for none.
    """
    rows_CK = torch.empty(len(rows_Cn), count, dtype=torch.int64)
    distances_CK = torch.empty(rows_CK.shape)
    keys_CKd = keys_Nd.new_empty(*rows_CK.shape, keys_Nd.shape[1])
    arrays = (queries_Cd.float().contiguous(), places_Cn, rows_Cn, rows_CK, distances_CK)
    numbers = (_bits(keys_Nd), NUMBER_TYPES[keys_Nd.dtype])
    fill_in_measured(*numbers, *(array.numpy() for array in arrays), _bits(keys_CKd))
    return rows_CK, distances_CK, keys_CKd


def read_entries(read: Callable[[str], Tensor], likely_words: int) -> Entries:
    """Return entries from columns (..., width) that `read` gives by their names."""
    keys = read("keys")
    nothing = keys.new_empty(*keys.shape[:-1], 0)
    return Entries(
        keys,
        read("values")[..., 0].long(),
        read("log_partitions")[..., 0],
        read("likely_words") if likely_words else nothing.int(),
        read("likely_probabilities") if likely_words else nothing,
    )


def _nearest_of_some(files: EntryFiles, rows_Cn: Tensor, queries_Cd: Tensor, count: int) -> Neighbours:
    queries = queries_Cd.detach().cpu()
    rows_CK, distances_CK, keys_CKd = nearest_candidates(*files.keys_at(rows_Cn), rows_Cn, queries, count)
    filled, empty_CK1 = rows_CK.clamp(min=0).flatten().numpy(), (rows_CK < 0)[..., None]
    any_empty = bool(empty_CK1.any())

    def read(name: str) -> Tensor:
        if name == "keys":
            return keys_CKd
        found = files.rows(name, filled).view(*rows_CK.shape, -1)
        return found.masked_fill_(empty_CK1, 0) if any_empty else found

    found = Neighbours(read_entries(read, files.layout.likely_words), distances_CK, rows_CK)
    return found if queries_Cd.device.type == "cpu" else found.on(queries_Cd.device)


def _bits(numbers: Tensor) -> np.ndarray:
    """Return numbers as the unsigned integers that share their memory."""
    if numbers.dtype == torch.float32:
        return numbers.numpy().view(np.uint32)
    return numbers.view(torch.int16).numpy().view(np.uint16)
