"""kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172): the words that followed the most similar contexts of the training text.

    p(w | q)  is in proportion to  sum over the K nearest entries i  of  1[v_i = w] exp(-||h_i - q||^2 / temperature)

Where the store grows with the stream, the K nearest are those of the training text and of the stream so far together.

Dimensions: `C` positions of a chunk, `K` neighbours, `N` entries of the stream, `V` vocabulary.
"""

import torch
from torch import Tensor

from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.memory.base import EntryStore
from mbpa_lm.memory.history import UNBOUNDED


class KnnExpert(Expert):
    """The distribution over the next words of the nearest entries of a datastore."""

    name = "knn"

    def __init__(self, store: EntryStore, neighbours: int, temperature: float, weight: float, grows: bool) -> None:
        """Args: weight is its share when it is mixed with the base model alone; grows: whether the stream is searched too."""
        self.weight = weight
        self.window = UNBOUNDED if grows else 0
        self._store, self._count, self._temperature = store, neighbours, temperature

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        scores_CK, values_CK = self._scores(chunk)
        masses_CV = torch.zeros_like(chunk.base_log_probabilities)
        return masses_CV.scatter_add_(1, values_CK, scores_CK.softmax(dim=1)).log()

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        scores_CK, values_CK = self._scores(chunk)
        of_target_CK = scores_CK.masked_fill(values_CK != targets[:, None], -torch.inf)
        return of_target_CK.logsumexp(1) - scores_CK.logsumexp(1)

    def _scores(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return the logits of the K nearest entries and the words that followed them, (C, K) each."""
        found = self._store.search(chunk.hidden_states, self._count)
        squared_CK, values_CK = found.squared_distances, found.entries.values
        if self.window:
            squared_CK, values_CK = self._with_stream(chunk, squared_CK, values_CK)
        return -squared_CK.to(chunk.base_log_probabilities) / self._temperature, values_CK

    def _with_stream(self, chunk: Chunk, squared_CK: Tensor, values_CK: Tensor) -> tuple[Tensor, Tensor]:
        stretch = chunk.stretch
        assert stretch is not None
        rows_N = torch.arange(len(stretch.values), device=stretch.values.device)
        norms_C = chunk.hidden_states.square().sum(1)
        squared_CN = (stretch.squared_norms + norms_C[:, None] - 2 * stretch.products).clamp_(min=0)
        squared_CN.masked_fill_(rows_N >= stretch.ends[:, None], torch.inf)
        nearest = squared_CN.topk(min(self._count, len(rows_N)), largest=False)
        squared = torch.cat([squared_CK, nearest.values.to(squared_CK)], dim=1)
        kept = squared.topk(self._count, largest=False)
        values = torch.cat([values_CK, stretch.values[nearest.indices]], dim=1)
        return kept.values, values.gather(1, kept.indices)
