"""The words that take every step in the restricted solver, with what the layer gives for them at the neighbours.

Dimensions: `B` queries, `K` neighbours, `A` words chosen in any case, `n` different words, `S` = A + M moved words, `d`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mbpa_lm.adaptation.problem import BaseSoftmax, Problem, TrainedSoftmax, at_least_single
from mbpa_lm.adaptation.products import products_with_rows
from mbpa_lm.adaptation.words import MergedWords, merge_words
from mbpa_lm.numerics.largest import largest
from mbpa_lm.numerics.softcap import capped

CHANGED_WORDS = 64
"""Words moved because slow adaptation has changed them most; their change at a key cannot be known from the trained layer."""

ROUNDING = 1e-5
"""Relative change of a probability that is none."""

LOGITS = 20
"""How far below the log-partition logits lie that still matter to a probability; their rounding is in proportion."""


@dataclass(frozen=True)
class MovedWords:
    """The moved words of each query among all that its neighbours list."""

    words: MergedWords
    places_BS: Tensor  # where the moved words stand among them
    filled_BS: Tensor  # bool: whether there is a word at that place
    own_BK: Tensor  # which of the moved words is each neighbour's own
    logits_BKS1: Tensor  # log-probabilities at the keys, up to one number a key; in the last column those of all other words
    rest_BK: Tensor  # probability of all other words under the trained layer, 0 where it is below rounding


def choose_moved_words(problem: Problem, pull_BK: Tensor, moved_words: int, also_BX: Tensor | None = None) -> MovedWords:
    """Choose the neighbours' words, `also`, and the M others that a first step with pulls w_k g[k] moves most."""
    base = problem.base
    assert base is not None
    always_BA = _always_moved(problem.values_BK, base)
    if also_BX is not None:
        always_BA = torch.cat([always_BA, also_BX], dim=1)
    count = always_BA.shape[1] + moved_words
    words = merge_words(base.likely_words_BKc, always_BA, least_places=count)
    first_step_Bn = words.sum_by_word(pull_BK, base.likely_probabilities_BKc).abs_()
    places_BS, filled_BS = words.largest(first_step_Bn, count)
    logits_BKS1, rest_BK = _base_logits(problem, base, words.words_Bn.gather(1, places_BS), filled_BS)
    own_places_BK = words.always_places_BA[:, : problem.values_BK.shape[1]]
    own_BK = _places_among(places_BS, words.words_Bn.shape[1]).gather(1, own_places_BK)
    return MovedWords(words, places_BS, filled_BS, own_BK, logits_BKS1, rest_BK)


def _always_moved(values_BK: Tensor, base: BaseSoftmax) -> Tensor:
    """Return the neighbours' words, and those that slow adaptation has changed most at the query, where it has: (B, A)."""
    if base.trained is None:
        return values_BK
    slow_BV = base.log_probabilities_BV.exp()
    change_BV = (slow_BV - base.trained.log_probabilities_BV.exp()).abs_()
    change_BV.sub_(slow_BV, alpha=ROUNDING).clamp_(min=0)  # or the order would be one of rounding before the first step
    changed_BX, _ = largest(change_BV, min(CHANGED_WORDS, change_BV.shape[1]))
    return torch.cat([values_BK, changed_BX.long()], dim=1)


def _base_logits(problem: Problem, base: BaseSoftmax, moved_BS: Tensor, filled_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return base log-probabilities of the moved words at the keys, in a last column those of all others: (B, K, S + 1).

    And the latter's probability (B, K) under the trained layer, 0 where it is below rounding. Where the steps start from
    another layer, all columns lack the change of the log-partition, which a softmax does not feel.
    """
    trained = base.trained
    layer = (problem.weight_Vd, problem.bias_V) if trained is None else (trained.weight_Vd, trained.bias_V)
    trained_BKS = _log_probabilities(problem, base, layer, moved_BS)
    full = bool(filled_BS.all())
    if not full:
        trained_BKS.masked_fill_(~filled_BS[:, None], -torch.inf)
    rest_BK = 1 - trained_BKS.exp().sum(-1)
    noise_BK = 8 * torch.finfo(rest_BK.dtype).eps * (LOGITS + base.log_partitions_BK.abs())
    rest_BK = torch.where(rest_BK > noise_BK, rest_BK, 0)
    if trained is None:
        return torch.cat([trained_BKS, rest_BK.log()[..., None]], dim=-1), rest_BK
    slow_BKS = _log_probabilities(problem, base, (problem.weight_Vd, problem.bias_V), moved_BS)
    if not full:
        slow_BKS.masked_fill_(~filled_BS[:, None], -torch.inf)
    log_rest_BK = rest_BK.log() + _growth_of_the_rest(base, trained, moved_BS, filled_BS)[:, None]
    return torch.cat([slow_BKS, log_rest_BK[..., None]], dim=-1), rest_BK


def _log_probabilities(problem: Problem, base: BaseSoftmax, layer: tuple[Tensor, Tensor | None], moved_BS: Tensor) -> Tensor:
    """Return the layer's logits of the moved words at the keys (B, K, S), less the trained layer's log-partition."""
    weight_Vd, bias_V = layer
    offset_BKS = -base.log_partitions_BK[..., None]
    logits_BKS = products_with_rows(problem.keys_BKd, weight_Vd, moved_BS)
    if bias_V is not None and problem.softcap is None:
        offset_BKS = offset_BKS + at_least_single(bias_V)[moved_BS][:, None]
    elif bias_V is not None:
        logits_BKS = logits_BKS + at_least_single(bias_V)[moved_BS][:, None]
    return capped(logits_BKS, problem.softcap).add_(offset_BKS)


def _growth_of_the_rest(base: BaseSoftmax, trained: TrainedSoftmax, moved_BS: Tensor, filled_BS: Tensor) -> Tensor:
    """Return the log of what slow adaptation made of the other words' unnormalized mass (B,), at the query.

    There both layers' whole distributions are known; the keys are near, and taken to have the same.
    """
    assert base.log_partitions_B is not None
    log_masses = []
    for log_probabilities_BV in (base.log_probabilities_BV, trained.log_probabilities_BV):
        moved_mass_B = log_probabilities_BV.gather(1, moved_BS).masked_fill(~filled_BS, -torch.inf).exp().sum(1)
        log_masses.append((1 - moved_mass_B).clamp(min=1e-4).log())
    return log_masses[0] - log_masses[1] + base.log_partitions_B - trained.log_partitions_B


def _places_among(places_BS: Tensor, n: int) -> Tensor:
    """Return for each of n places which of the chosen it is (B, n)."""
    order = torch.arange(places_BS.shape[1], device=places_BS.device).expand_as(places_BS)
    return places_BS.new_zeros(len(places_BS), n).scatter_(1, places_BS, order)
