"""The dual solver on the few words that the steps can move, at a cost that does not depend on the vocabulary.

A step moves the logit of word u at the query by alpha sum_k w_k g[k] (1[u = v_k] - p_k(u)), g[k] = h_k . q + 1. That is much
for a neighbour's own word v_k and little for a word that is unlikely at every neighbour. So there are three kinds of words:

- *moved*: the neighbours' words, and the M others that are moved most by the first step. They take every step exactly
  as in dual.py; all other words count in the softmax at a key through their summed mass, rest_k = 1 - sum of the moved p_k(u).
- *listed*: likely at some neighbour, but not moved. With r_k the sum over the steps of rest_k's share relative to the first,
  their logits change, to first order, by -alpha sum_k w_k g[k] r_k p_k(u).
- *all others* keep their base logit.

The likely words of a key and the base distribution at the query were known when the base model read them. Each kind's mass at
the query is summed as it is, so the result is a distribution whatever was left out. Masses of what is left over are differences
from 1: below the rounding of that difference such a mass counts as 0 at a key, and at the query it is summed word by word.

Dimensions: `B` queries, `K` neighbours, `c` likely words a neighbour, `n` = K (c + 1) slots, `S` = K + M moved words, `d`.
"""

import torch
from torch import Tensor

from mbpa_lm.adaptation.problem import Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.adaptation.words import MergedWords, merge_words
from mbpa_lm.errors import AdaptationError

QUERIES_AT_ONCE = 128

SMALL_MASS = 0.05
"""Mass of the other words at the query below which a difference from 1 is not precise enough."""


def solve(problem: Problem, rule: AdaptationRule, targets_B: Tensor | None = None, moved_words: int = 64) -> Tensor:
    """Return the adapted log-probabilities (B, V), or those of the targets (B,).

    Args: problem.base must be there (`Problem.with_base` makes it); moved_words: M. Raises AdaptationError for a rule
    whose steps leave the span of the neighbours (any but SGD).
    """
    if rule.optimizer != "sgd":
        raise AdaptationError(f"the restricted solver takes sgd only, not {rule.optimizer}; use adaptation.solver reference")
    turns = problem.turns(QUERIES_AT_ONCE, targets_B)
    return torch.cat([_solve_some(part, rule, targets, moved_words) for part, targets in turns])


def _solve_some(problem: Problem, rule: AdaptationRule, targets_B: Tensor | None, moved_words: int) -> Tensor:
    base = problem.base
    assert base is not None
    one = problem.bias_as_input if rule.adapt_bias else 0.0
    towards_BK = (problem.keys_BKd @ problem.queries_Bd[..., None])[..., 0] + one
    pull_BK = rule.alpha * problem.weights_BK
    likely_BKc = base.likely_log_probabilities_BKc.exp()

    words = merge_words(base.likely_words_BKc.flatten(1), problem.values_BK)
    first_step_Bn = words.sum_by_word(((pull_BK * towards_BK)[..., None] * likely_BKc).flatten(1)).abs()
    moved_BS, place_BS = words.largest(first_step_Bn, problem.values_BK.shape[1] + moved_words)

    steps_BKS, frozen_BK = _take_steps(problem, rule, moved_BS, place_BS < 0, pull_BK, one)
    shift_BS = (towards_BK[:, None] @ steps_BKS)[:, 0]
    listed_Bn = words.sum_by_word((-(pull_BK * towards_BK * frozen_BK)[..., None] * likely_BKc).flatten(1))
    shift_Bn = words.put(listed_Bn, place_BS, shift_BS)  # at the last slot of each word, 0 elsewhere
    return _shifted(base.log_probabilities_BV, words, shift_Bn, targets_B)


def _take_steps(
    problem: Problem, rule: AdaptationRule, moved_BS: Tensor, absent_BS: Tensor, pull_BK: Tensor, one: float
) -> tuple[Tensor, Tensor]:
    """Return the vectors a_k of the moved words (B, K, S), and r_k (B, K) of the frozen ones."""
    base = problem.base
    assert base is not None
    weight_BSd = problem.weight_Vd.index_select(0, moved_BS.flatten()).view(*moved_BS.shape, -1)
    logits_BKS = problem.keys_BKd @ weight_BSd.mT
    if problem.bias_V is not None:
        logits_BKS = logits_BKS + problem.bias_V[moved_BS][:, None]
    known_BKS = (logits_BKS - base.log_partitions_BK[..., None]).masked_fill_(absent_BS[:, None], -torch.inf)
    rest_BK = _without_noise(1 - known_BKS.exp().sum(-1), logits_BKS)
    logits_BKS1 = torch.cat([known_BKS, rest_BK.log()[..., None]], dim=-1)  # the last column is all frozen words

    gram_BKK = problem.keys_BKd @ problem.keys_BKd.mT + one
    own_BKS1 = torch.zeros_like(logits_BKS1)
    own_BKS1[..., :-1] = pull_BK[..., None] * (moved_BS[:, None] == problem.values_BK[..., None]) * ~absent_BS[:, None]
    keep = 1 - rule.alpha * rule.beta
    steps_BKS1 = torch.zeros_like(logits_BKS1)
    frozen_BK = torch.zeros_like(rest_BK)
    for _ in range(rule.steps):
        probabilities_BKS1 = torch.softmax(torch.baddbmm(logits_BKS1, gram_BKK, steps_BKS1), dim=-1)
        frozen_BK = keep * frozen_BK + torch.where(rest_BK > 0, probabilities_BKS1[..., -1] / rest_BK, 0)
        steps_BKS1 = torch.addcmul(own_BKS1, probabilities_BKS1, pull_BK[..., None], value=-1).add_(steps_BKS1, alpha=keep)
        steps_BKS1[..., -1] = 0
    return steps_BKS1[..., :-1], frozen_BK


def _without_noise(rest_BK: Tensor, logits_BKS: Tensor) -> Tensor:
    """Set to 0 what may be nothing but the rounding of the logits."""
    noise_BK = 8 * torch.finfo(rest_BK.dtype).eps * (1 + logits_BKS.abs().amax(-1))
    return torch.where(rest_BK > noise_BK, rest_BK, 0)


def _shifted(log_probabilities_BV: Tensor, words: MergedWords, shift_Bn: Tensor, targets_B: Tensor | None) -> Tensor:
    """Shift the logits of the listed and moved words and normalize; sums over the vocabulary only where it must."""
    base_Bn = log_probabilities_BV.gather(1, words.words_Bn).masked_fill(~words.last_Bn, -torch.inf)
    # log(1 - listed + listed shifted), from the two sums apart so that a large shift does not overflow
    others_B = 1 - base_Bn.exp().sum(1)
    small = (others_B < SMALL_MASS).nonzero()[:, 0]
    others_B = others_B.clamp(min=SMALL_MASS).log()
    others_B[small] = log_probabilities_BV[small].scatter(1, words.words_Bn[small], -torch.inf).logsumexp(1)
    log_total_B = torch.logaddexp(others_B, (base_Bn + shift_Bn).logsumexp(1))[:, None]
    if targets_B is None:
        return log_probabilities_BV.scatter_add(1, words.words_Bn, shift_Bn) - log_total_B
    hit_Bn = words.last_Bn & (words.words_Bn == targets_B[:, None])
    own_B1 = log_probabilities_BV.gather(1, targets_B[:, None]) + (shift_Bn * hit_Bn).sum(1, keepdim=True)
    return (own_B1 - log_total_B)[:, 0]
