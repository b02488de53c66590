"""What a solver is given: the trained layer, the neighbours of each query with their weights, and the queries.

Dimensions: `B` queries, `K` neighbours, `c` likely words kept with an entry, `V` vocabulary, `d` hidden size.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class BaseSoftmax:
    """What the base model had computed before anyone asked; only the restricted solver needs it."""

    log_probabilities_BV: Tensor  # of the next token at each query
    log_partitions_BK: Tensor  # log sum of exp of the logits at each key
    likely_words_BKc: Tensor  # int64, distinct: the likeliest words at each key, in any order
    likely_log_probabilities_BKc: Tensor  # of those words


@dataclass(frozen=True)
class Problem:
    """B queries, each with its own neighbours, under one trained layer."""

    weight_Vd: Tensor
    bias_V: Tensor | None
    keys_BKd: Tensor
    values_BK: Tensor  # int64
    weights_BK: Tensor  # of the neighbours; 0 where there is none
    queries_Bd: Tensor
    base: BaseSoftmax | None = None

    @property
    def bias_as_input(self) -> float:
        """What a bias adds to a scalar product of two hidden states, as the weight of one more input that is always 1."""
        return 0.0 if self.bias_V is None else 1.0

    def split(self, queries: int) -> list["Problem"]:
        """Cut into problems of at most so many queries."""
        count = len(self.queries_Bd)
        return [self._rows(slice(begin, begin + queries)) for begin in range(0, count, queries)]

    def turns(self, queries: int, targets_B: Tensor | None) -> list[tuple["Problem", Tensor | None]]:
        """Cut as `split` does, each part with its own targets if there are any."""
        parts = self.split(queries)
        targets = [None] * len(parts) if targets_B is None else targets_B.split(queries)
        return list(zip(parts, targets, strict=True))

    def with_base(self, likely_words: int) -> "Problem":
        """Return the problem with what `base` holds computed from the layer, for those who have not kept it."""
        at_keys_BKV = linear(self.keys_BKd, self.weight_Vd, self.bias_V)
        log_partitions_BK = at_keys_BKV.logsumexp(-1)
        likely = at_keys_BKV.topk(min(likely_words, len(self.weight_Vd)))
        at_queries_BV = torch.log_softmax(linear(self.queries_Bd, self.weight_Vd, self.bias_V), dim=-1)
        base = BaseSoftmax(at_queries_BV, log_partitions_BK, likely.indices, likely.values - log_partitions_BK[..., None])
        return replace(self, base=base)

    def _rows(self, rows: slice) -> "Problem":
        base = self.base and BaseSoftmax(*(getattr(self.base, field.name)[rows] for field in fields(BaseSoftmax)))
        return replace(
            self,
            keys_BKd=self.keys_BKd[rows],
            values_BK=self.values_BK[rows],
            weights_BK=self.weights_BK[rows],
            queries_Bd=self.queries_Bd[rows],
            base=base,
        )


def pick(log_probabilities_BV: Tensor, targets_B: Tensor | None) -> Tensor:
    """Return the targets' log-probabilities (B,), or the distributions (B, V) as they are where there are no targets."""
    return log_probabilities_BV if targets_B is None else log_probabilities_BV.gather(1, targets_B[:, None])[:, 0]
