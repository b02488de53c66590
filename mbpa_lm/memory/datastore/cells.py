"""The search of an index of cells on a CPU, in two steps: which cells are nearest, and what lies in them.

FAISS does the second. The first is a product of all queries with all centroids, for which its wheels need several times as
long as PyTorch, and as long as for all the rest.

Dimensions: `C` queries, `M` cells, `d` hidden size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Cells:
    """An index of cells on the CPU, and its centroids."""

    index: Any
    centroids_Md: Tensor
    squared_norms_M: Tensor

    @classmethod
    def of(cls, index: Any) -> "Cells":
        """Take the centroids of an index on the CPU."""
        centroids_Md = torch.from_numpy(index.quantizer.reconstruct_n(0, index.nlist))
        return cls(index, centroids_Md, centroids_Md.square().sum(1))

    def search(self, queries_Cd: np.ndarray, wanted: int, cells: int) -> np.ndarray:
        """Return the rows (C, wanted) that the index finds in so many cells, nearest first, -1 for none."""
        from faiss.contrib.ivf_tools import search_preassigned

        queries = torch.from_numpy(queries_Cd)
        halves_CM = torch.addmm(self.squared_norms_M / 2, queries, self.centroids_Md.T, alpha=-1)
        nearest = halves_CM.topk(min(cells, len(self.centroids_Md)), largest=False)
        squared_distances = (2 * nearest.values + queries.square().sum(1, keepdim=True)).clamp_(min=0)
        found = search_preassigned(self.index, queries_Cd, wanted, nearest.indices.numpy(), squared_distances.numpy())
        return np.asarray(found[1])
