"""What a solver is given: the trained layer, the neighbours of each query with their weights, and the queries.

Dimensions: `B` queries, `K` neighbours, `c` likely words kept with an entry, `V` vocabulary, `d` hidden size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from mbpa_lm.numerics.softcap import capped


@dataclass(frozen=True)
class TrainedSoftmax:
    """The trained layer and what it gives at the queries, where the steps start from another, slowly adapted one."""

    weight_Vd: Tensor
    bias_V: Tensor | None
    log_probabilities_BV: Tensor
    log_partitions_B: Tensor


@dataclass(frozen=True)
class BaseSoftmax:
    """What was computed before anyone asked; only the restricted solver needs it.

    What belongs to the keys is the trained layer's. What belongs to the queries is that of the problem's layer.
    """

    log_probabilities_BV: Tensor  # of the next token at each query
    log_partitions_BK: Tensor  # log sum of exp of the logits at each key
    likely_words_BKc: Tensor  # int32 or int64, distinct: the likeliest words at each key, in any order
    likely_probabilities_BKc: Tensor  # of those words
    log_partitions_B: Tensor | None = None  # at each query; only needed beside `trained`
    trained: TrainedSoftmax | None = None  # None where the problem's layer is the trained one

    def accumulating(self) -> "BaseSoftmax":
        """Return all numbers in at least float32."""
        return replace(
            self,
            log_probabilities_BV=at_least_single(self.log_probabilities_BV),
            log_partitions_BK=at_least_single(self.log_partitions_BK),
            likely_probabilities_BKc=at_least_single(self.likely_probabilities_BKc),
        )

    def rows(self, rows: slice | Tensor) -> "BaseSoftmax":
        """Return what belongs to some of the queries."""
        trained = self.trained and replace(
            self.trained,
            log_probabilities_BV=self.trained.log_probabilities_BV[rows],
            log_partitions_B=self.trained.log_partitions_B[rows],
        )
        return BaseSoftmax(
            self.log_probabilities_BV[rows],
            self.log_partitions_BK[rows],
            self.likely_words_BKc[rows],
            self.likely_probabilities_BKc[rows],
            None if self.log_partitions_B is None else self.log_partitions_B[rows],
            trained,
        )


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
    softcap: float | None = None  # of the trained layer's logits; what the steps change is added to capped logits

    def trained_logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of the layer, before any step."""
        return capped(linear(states, self.weight_Vd, self.bias_V), self.softcap)

    def accumulating(self) -> "Problem":
        """Return the problem with keys, weights and queries, and the layer, in at least float32, to compute with."""
        bias_V = None if self.bias_V is None else at_least_single(self.bias_V)
        return replace(self.accumulating_but_the_layer(), weight_Vd=at_least_single(self.weight_Vd), bias_V=bias_V)

    def accumulating_but_the_layer(self) -> "Problem":
        """Return the problem with keys, weights and queries in at least float32."""
        return replace(
            self,
            keys_BKd=at_least_single(self.keys_BKd),
            weights_BK=at_least_single(self.weights_BK),
            queries_Bd=at_least_single(self.queries_Bd),
            base=self.base and self.base.accumulating(),
        )

    def split(self, queries: int) -> list["Problem"]:
        """Cut into problems of at most so many queries."""
        count = len(self.queries_Bd)
        return [self.rows(slice(begin, begin + queries)) for begin in range(0, count, queries)]

    def turns(self, queries: int, targets_B: Tensor | None) -> list[tuple["Problem", Tensor | None]]:
        """Cut as `split` does, each part with its own targets if there are any."""
        parts = self.split(queries)
        targets = [None] * len(parts) if targets_B is None else targets_B.split(queries)
        return list(zip(parts, targets, strict=True))

    def with_base(self, likely_words: int) -> "Problem":
        """Return the problem with what `base` holds computed from the layer, for those who have not kept it."""
        whole = self.accumulating()
        at_keys_BKV = whole.trained_logits(whole.keys_BKd)
        log_partitions_BK = at_keys_BKV.logsumexp(-1)
        likely = at_keys_BKV.topk(min(likely_words, len(self.weight_Vd)))
        at_queries_BV = torch.log_softmax(whole.trained_logits(whole.queries_Bd), dim=-1)
        probabilities_BKc = (likely.values - log_partitions_BK[..., None]).exp()
        return replace(self, base=BaseSoftmax(at_queries_BV, log_partitions_BK, likely.indices, probabilities_BKc))

    def rows(self, rows: slice | Tensor) -> "Problem":
        """Return the problem of some of the queries."""
        return replace(
            self,
            keys_BKd=self.keys_BKd[rows],
            values_BK=self.values_BK[rows],
            weights_BK=self.weights_BK[rows],
            queries_Bd=self.queries_Bd[rows],
            base=self.base and self.base.rows(rows),
        )


def at_least_single(tensor: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def normalize(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (B, V) and the log-partitions (B,)."""
    log_probabilities_BV = torch.log_softmax(logits_BV, dim=-1)  # in one pass, which logsumexp is not
    return log_probabilities_BV, logits_BV.amax(dim=-1) - log_probabilities_BV.amax(dim=-1)


def pick(log_probabilities_BV: Tensor, targets_B: Tensor | None) -> Tensor:
    """Return the targets' log-probabilities (B,), or the distributions (B, V) as they are where there are no targets."""
    return log_probabilities_BV if targets_B is None else log_probabilities_BV.gather(1, targets_B[:, None])[:, 0]
