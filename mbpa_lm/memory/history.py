"""The stream so far, in its own order: every hidden state with the token that followed.

A cache attends to all of it, or to the most recent part. What a chunk sees is a view of one growing tensor; with a size, what
no query can see any more is dropped from its front.

Dimensions: `C` positions of a chunk, `N` entries, `d` hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNBOUNDED = 1 << 62
"""A window that no stream is longer than."""


@dataclass(frozen=True)
class Stretch:
    """The entries that the positions of a chunk see: position c those in [begins[c], ends[c])."""

    products: Tensor  # (C, N), of the hidden state at each position with each entry's
    squared_norms: Tensor  # (N,), of the entries' hidden states
    values: Tensor  # (N,) int64, the token that followed each entry
    ends: Tensor  # (C,) int64
    size: int  # most entries that a position sees, the most recent ones

    def begins(self, window: int) -> Tensor:
        """Return (C,) where a window over the most recent entries begins; raises ValueError for more than there are."""
        if window > self.size:
            raise ValueError(f"a window of {window} on a stretch of {self.size}")
        return (self.ends - window).clamp(min=0)

    def of(self, positions: slice) -> "Stretch":
        """Return that of some of the positions."""
        return Stretch(self.products[positions], self.squared_norms, self.values, self.ends[positions], self.size)


class StreamHistory:
    """Hidden states and next tokens, read before they are written, like a memory."""

    def __init__(self, size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Keep the last `size` entries, or all of them with UNBOUNDED; products are made in `dtype`."""
        self.size = size
        self._keys_Nd = torch.empty(0, hidden_size, dtype=dtype, device=device)
        self._squared_norms_N = torch.empty(0, dtype=dtype, device=device)
        self._values_N = torch.empty(0, dtype=torch.int64, device=device)
        self._begin = self._end = 0

    def __len__(self) -> int:
        return min(self._end - self._begin, self.size)

    def read_and_write(self, keys_Cd: Tensor, values_C: Tensor) -> Stretch:
        """Return what the positions of a chunk see, each the stream before it; then they are part of it."""
        keys_Cd = keys_Cd.to(self._keys_Nd.dtype)
        self._make_room(len(keys_Cd))
        before = len(self)
        begin, self._begin = self._end - before, self._end - before
        new = slice(self._end, self._end + len(keys_Cd))
        self._keys_Nd[new], self._values_N[new] = keys_Cd, values_C
        self._squared_norms_N[new] = keys_Cd.square().sum(1)
        ends_C = torch.arange(before, before + len(keys_Cd), device=keys_Cd.device)
        self._end += len(keys_Cd)
        seen = slice(begin, self._end)
        products_CN = keys_Cd @ self._keys_Nd[seen].T
        return Stretch(products_CN, self._squared_norms_N[seen], self._values_N[seen], ends_C, self.size)

    def _make_room(self, count: int) -> None:
        """Move what can still be seen to the front of a tensor of twice its length, where there is no room for more."""
        if self._end + count <= len(self._keys_Nd):
            return
        kept, capacity = slice(self._end - len(self), self._end), 2 * (len(self) + count)
        for name in ("_keys_Nd", "_squared_norms_N", "_values_N"):
            old = getattr(self, name)
            new = old.new_empty(capacity, *old.shape[1:])
            new[: len(self)] = old[kept]
            setattr(self, name, new)
        self._begin, self._end = 0, len(self)
