"""Continuous cache (Grave et al. 2017, arXiv 1612.04426): recent words come again after contexts like theirs.

    p(w | q)  is in proportion to  sum over the last `window` entries i of  1[v_i = w] exp(theta h_i . q)

With the whole stream as its window it is the unbounded cache (Grave et al. 2017, arXiv 1711.02604), without the search for
nearest entries that paper makes do with.

Dimensions: `C` positions of a chunk, `N` entries, `V` vocabulary.
"""

import torch
from torch import Tensor

from mbpa_lm.adaptation.problem import pick
from mbpa_lm.experts import cache_compiled
from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.memory.history import UNBOUNDED, Stretch
from mbpa_lm.numerics.compiled import can_take


class CacheExpert(Expert):
    """A cache over a window of the stream; the base model where there is nothing in it yet."""

    def __init__(self, window: int, theta: float, weight: float) -> None:
        """Args: window 0 for the whole stream; weight is its share when it is mixed with the base model alone."""
        self.name = f"cache-{window or 'all'}"
        self.weight = weight
        self.window = window or UNBOUNDED
        self._theta = theta

    def log_probabilities(self, chunk: Chunk) -> Tensor:
        stretch = chunk.stretch
        assert stretch is not None
        scores_CN, log_total_C = self._scores(stretch)
        masses_CN = (scores_CN - log_total_C[:, None]).exp()
        masses_CV = torch.zeros_like(chunk.base_log_probabilities)
        masses_CV.scatter_add_(1, stretch.values.expand_as(masses_CN), masses_CN)
        return torch.where(stretch.ends[:, None] > 0, masses_CV.log(), chunk.base_log_probabilities)

    def target_log_probabilities(self, chunk: Chunk, targets: Tensor) -> Tensor:
        stretch = chunk.stretch
        assert stretch is not None
        if can_take(stretch.products) and stretch.products.dtype == torch.float32:
            found_C = torch.empty_like(stretch.products[:, 0])
            tensors = (stretch.products, stretch.values, stretch.begins(self.window), stretch.ends, targets, found_C)
            cache_compiled.log_shares(*(tensor.numpy() for tensor in tensors), self._theta)
        else:
            scores_CN, log_total_C = self._scores(stretch)
            found_C = scores_CN.masked_fill_(stretch.values != targets[:, None], -torch.inf).logsumexp(1) - log_total_C
        return torch.where(stretch.ends > 0, found_C, pick(chunk.base_log_probabilities, targets))

    def _scores(self, stretch: Stretch) -> tuple[Tensor, Tensor]:
        """Return theta h_i . q (C, N), -inf outside the window, and the log of the sum of their exponentials (C,)."""
        rows_N = torch.arange(len(stretch.values), device=stretch.values.device)
        seen_CN = (rows_N >= stretch.begins(self.window)[:, None]) & (rows_N < stretch.ends[:, None])
        scores_CN = (self._theta * stretch.products).masked_fill_(~seen_CN, -torch.inf)
        return scores_CN, scores_CN.logsumexp(1)
