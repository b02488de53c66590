"""Tensors that hold the entries of a memory on the model's device, and their keys as they are searched.

Dimensions: `C` positions of a chunk, `K` neighbours, `N` entries, `c` likely words, `d` hidden size.
"""

import torch
from torch import Tensor

from mbpa_lm.memory.base import Entries


class EntryTensors:
    """Room for so many entries, written and read by row.

    Distances are Euclidean, or, with a `metric` (d,) of positive numbers, sum_i metric_i (h_i - q_i)^2: then the keys are also
    kept as they are searched, stretched by its square root.
    """

    def __init__(
        self,
        capacity: int,
        hidden_size: int,
        likely_words: int,
        dtype: torch.dtype,
        device: torch.device,
        metric: Tensor | None = None,
    ) -> None:
        self.capacity = capacity
        self._stored = Entries(
            keys=torch.empty(capacity, hidden_size, dtype=dtype, device=device),
            values=torch.empty(capacity, dtype=torch.int64, device=device),
            log_partitions=torch.empty(capacity, dtype=torch.promote_types(dtype, torch.float32), device=device),
            likely_words=torch.empty(capacity, likely_words, dtype=torch.int32, device=device),
            likely_probabilities=torch.empty(capacity, likely_words, dtype=dtype, device=device),
        )
        self._scale_d = None if metric is None else metric.to(device, dtype).sqrt()
        self.searched_Nd = self._stored.keys if metric is None else torch.empty_like(self._stored.keys)
        self.squared_norms_N = torch.empty(capacity, dtype=dtype, device=device)

    def scaled(self, keys_Cd: Tensor) -> Tensor:
        """Return keys as they are searched."""
        keys_Cd = keys_Cd.to(self.searched_Nd.dtype)
        return keys_Cd if self._scale_d is None else keys_Cd * self._scale_d

    def write(self, rows: slice, entries: Entries) -> None:
        """Put entries into rows."""
        for stored, new in zip(self._stored.tensors(), entries.tensors(), strict=True):
            stored[rows] = new
        if self._scale_d is not None:
            self.searched_Nd[rows] = self.scaled(entries.keys)
        self.squared_norms_N[rows] = self.searched_Nd[rows].square().sum(-1)

    def move_to_front(self, rows: slice) -> None:
        """Copy rows to the first ones."""
        count = rows.stop - rows.start
        searched = [] if self._scale_d is None else [self.searched_Nd]
        for tensor in (*self._stored.tensors(), *searched, self.squared_norms_N):
            tensor[:count] = tensor[rows].clone()

    def at(self, rows_CK: Tensor, empty_CK: Tensor) -> Entries:
        """Return the entries in the given rows, zeros where a place is empty."""
        filled = rows_CK.clamp(min=0).flatten()
        found = [stored.index_select(0, filled).view(*rows_CK.shape, *stored.shape[1:]) for stored in self._stored.tensors()]
        if bool(empty_CK.any()):
            for tensor in found:
                tensor[empty_CK] = 0
        return Entries(*found)
