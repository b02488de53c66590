"""The dual solver on the few words that the steps can move, at a cost that does not depend on the vocabulary.

A step moves the logit of word u at the query by alpha sum_k w_k g[k] (1[u = v_k] - p_k(u)), g[k] = h_k . q + 1. That is much
for a neighbour's own word v_k and little for a word that is unlikely at every neighbour. So there are three kinds of words:

- *moved*: the neighbours' words, and the M others that are moved most by the first step. They take every step exactly
  as in dual.py; all other words count in the softmax at a key through their summed mass, rest_k = 1 - sum of the moved p_k(u).
- *listed*: likely at some neighbour, but not moved. With r_k the sum over the steps of alpha times rest_k's share relative to
  the first, their logits change, to first order, by - sum_k w_k g[k] r_k p_k(u).
- *all others* keep their base logit.

The likely words of a key and the base distribution at the query were known when the base model read them. Each kind's mass at
the query is summed as it is, so the result is a distribution whatever was left out. Masses of what is left over are differences
from 1: below the rounding of that difference such a mass counts as 0 at a key, and at the query it is summed word by word.

What is left out is bounded. A word that neighbour k does not list is there at most as likely as the least likely that it
lists, l_k, so no word's shift misses more than sum_k w_k |g[k]| r_k l_k. What the first order misses of a listed word is its
shift at a key times its pull at the query, twice at most max |G| max |g| (sum_k w_k r_k p_k(u))^2. Steps so long that they
overshoot, alpha times the curvature above 2, multiply both. A query whose bound is above the tolerance is solved again with
more words. Where the steps start from slowly adapted weights the bound says less: what those changed at the keys is
known for the moved words only, and guessed for the others.

Dimensions: `B` queries, `K` neighbours, `c` likely words a neighbour, `n` different words, `S` = K + M moved words, `d`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mbpa_lm.adaptation import dual
from mbpa_lm.adaptation.moved_words import choose_moved_words
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem, at_least_single, pick
from mbpa_lm.adaptation.products import span_products
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.adaptation.steps import SPAN_OPTIMIZERS, shift_at, take_steps
from mbpa_lm.adaptation.words import MergedWords

QUERIES_AT_ONCE = 256

SMALL_MASS = 0.05
"""Mass of the other words at the query below which a difference from 1 is not precise enough."""

WIDENING = 4
"""Factor of the moved words, and then of the listed words too, for a query whose bound is above the tolerance."""


@dataclass(frozen=True)
class Solution:
    """Adapted log-probabilities and how far they may be from the dual solver's."""

    log_probabilities: Tensor  # (B, V), or (B,) of the targets
    bounds_B: Tensor  # nats, for any word of the vocabulary
    widened_B: Tensor  # bool: whether more words than asked for were needed


def solve(
    problem: Problem,
    rule: AdaptationRule,
    targets_B: Tensor | None = None,
    moved_words: int = 16,
    tolerance: float = 0.1,
) -> Tensor:
    """Return the adapted log-probabilities (B, V), or those of the targets (B,); see `solve_with_bounds`."""
    return solve_with_bounds(problem, rule, targets_B, moved_words, tolerance).log_probabilities


def solve_with_bounds(
    problem: Problem,
    rule: AdaptationRule,
    targets_B: Tensor | None = None,
    moved_words: int = 16,
    tolerance: float = 0.1,
) -> Solution:
    """Return the adapted log-probabilities with the bound of their error.

    Args: problem.base must be there (`Problem.with_base` makes it); moved_words: M; tolerance in nats, inf for never widening.
    Raises AdaptationError for a rule whose steps leave the span of the neighbours (RMSProp, Adam).
    """
    rule.require("restricted", SPAN_OPTIMIZERS)
    problem = problem.accumulating_but_the_layer()
    parts = [_solve_some(part, rule, targets, moved_words) for part, targets in problem.turns(QUERIES_AT_ONCE, targets_B)]
    log_probabilities, bounds_B = (torch.cat(column) for column in zip(*parts, strict=True))
    widened_B = bounds_B > tolerance
    rows = widened_B.nonzero()[:, 0]
    likely_words = 0 if problem.base is None else problem.base.likely_words_BKc.shape[2]
    first = True
    while len(rows):
        moved_words = max(1, moved_words) * WIDENING
        targets = None if targets_B is None else targets_B[rows]
        if first:  # longer lists of likely words cost a softmax at every neighbour, and are seldom what is missing
            found = _solve_some(problem.rows(rows), rule, targets, moved_words)
        else:
            likely_words = max(1, likely_words) * WIDENING
            found = _solve_wider(problem.rows(rows), rule, targets, likely_words, moved_words)
        log_probabilities[rows], bounds_B[rows] = found
        rows, first = rows[bounds_B[rows] > tolerance], False
    return Solution(log_probabilities, bounds_B, widened_B)


def add_shifts(
    problem: Problem, rule: AdaptationRule, logits_BV: Tensor, moved_words: int = 16, tolerance: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Add to logits (B, V), in place, what the steps change, up to one number that all words of a query share.

    Only the few words that are shifted are touched: nothing is summed over the vocabulary but for queries whose bound is above
    the tolerance. `problem.base.log_probabilities_BV` is not looked at. Returns the bounds (B,) and which queries were solved
    with more words (B,). Raises what `solve_with_bounds` does.
    """
    rule.require("restricted", SPAN_OPTIMIZERS)
    problem = problem.accumulating_but_the_layer()
    bounds, widened = [], []
    for begin in range(0, len(logits_BV), QUERIES_AT_ONCE):
        rows = slice(begin, begin + QUERIES_AT_ONCE)
        part, logits = problem.rows(rows), logits_BV[rows]
        words, shift_Bn, bounds_B = _find_shifts(part, rule, moved_words)
        is_wide_B = bounds_B > tolerance
        shift_Bn = shift_Bn.masked_fill(~words.filled_Bn | is_wide_B[:, None], 0)
        logits.scatter_add_(1, words.words_Bn, shift_Bn.to(logits.dtype))
        wide = is_wide_B.nonzero()[:, 0]
        if len(wide):
            some = part.rows(wide)
            assert some.base is not None
            base = replace(some.base, log_probabilities_BV=torch.log_softmax(at_least_single(logits[wide]), dim=-1))
            solution = solve_with_bounds(replace(some, base=base), rule, None, moved_words * WIDENING, tolerance)
            logits[wide], bounds_B[wide] = solution.log_probabilities.to(logits.dtype), solution.bounds_B
        bounds.append(bounds_B)
        widened.append(is_wide_B)
    return torch.cat(bounds), torch.cat(widened)


def _solve_wider(
    problem: Problem, rule: AdaptationRule, targets_B: Tensor | None, likely_words: int, moved_words: int
) -> tuple[Tensor, Tensor]:
    """Solve with the likely words computed anew; with the whole vocabulary where that is no more work.

    One query at a time: products of another shape are rounded otherwise, and how many queries there are is known only when all
    of a chunk have been solved, the later ones too.
    """
    turns = problem.turns(1, targets_B)
    if likely_words * WIDENING >= len(problem.weight_Vd):
        found = [dual.solve(part, rule, targets) for part, targets in turns]
        return torch.cat(found), problem.queries_Bd.new_zeros(len(problem.queries_Bd))
    parts = [_solve_some(part.with_base(likely_words), rule, targets, moved_words) for part, targets in turns]
    log_probabilities, bounds_B = (torch.cat(column) for column in zip(*parts, strict=True))
    return log_probabilities, bounds_B


def _solve_some(problem: Problem, rule: AdaptationRule, targets_B: Tensor | None, moved_words: int) -> tuple[Tensor, Tensor]:
    assert problem.base is not None
    words, shift_Bn, bounds_B = _find_shifts(problem, rule, moved_words)
    return _shifted(problem.base.log_probabilities_BV, words, shift_Bn, targets_B), bounds_B


def _find_shifts(problem: Problem, rule: AdaptationRule, moved_words: int) -> tuple[MergedWords, Tensor, Tensor]:
    """Return the listed and moved words of each query, how far their logits are shifted (B, n), and the bounds (B,)."""
    base = problem.base
    assert base is not None
    towards_BK, gram_BKK = span_products(problem, rule.adapt_bias)
    pull_BK = problem.weights_BK * towards_BK

    moved = choose_moved_words(problem, pull_BK, moved_words)
    words, places_BS, own_BK, rest_BK = moved.words, moved.places_BS, moved.own_BK, moved.rest_BK
    sizes, velocity_kept = rule.step_sizes(), rule.velocity_kept
    steps = take_steps(
        moved.logits_BKS1, gram_BKK, problem.weights_BK, own_BK, sizes, rule.beta, velocity_kept, frozen_last=True
    )
    if steps.probabilities_BKS is None:
        frozen_BK = torch.zeros_like(rest_BK)
    else:
        frozen_BK = torch.where(rest_BK > 0, steps.probabilities_BKS[..., -1] / rest_BK, 0)
    frozen_pull_BK = pull_BK * frozen_BK
    listed_Bn = words.sum_by_word(-frozen_pull_BK, base.likely_probabilities_BKc)
    frozen_weights_BK = problem.weights_BK * frozen_BK
    unsigned_Bn = words.sum_by_word(frozen_weights_BK, base.likely_probabilities_BKc).scatter_(1, places_BS, 0)
    bounds_B = _bounds(problem, base, towards_BK, gram_BKK, frozen_weights_BK, unsigned_Bn.amax(1), sizes)
    shift_BS = shift_at(towards_BK, problem.weights_BK, own_BK, steps, places_BS.shape[1])
    return words, listed_Bn.scatter_(1, places_BS, shift_BS), bounds_B


def _bounds(
    problem: Problem,
    base: BaseSoftmax,
    towards_BK: Tensor,
    gram_BKK: Tensor,
    frozen_weights_BK: Tensor,
    most_listed_B: Tensor,
    step_sizes: list[float],
) -> Tensor:
    """Return the bound of each query's error (B,); most_listed is the largest sum_k w_k r_k p_k(u) of a listed word."""
    gram_BKK, towards_BK = gram_BKK.abs(), towards_BK.abs()
    # Twice, once for the word and once for the sum that it is divided by: these errors may have either sign.
    bounds_B = 2 * gram_BKK.amax((1, 2)) * towards_BK.amax(1) * most_listed_B.square()
    if base.likely_words_BKc.shape[2] < len(problem.weight_Vd):
        least_BK = 1.0 if base.likely_words_BKc.shape[2] == 0 else base.likely_probabilities_BKc.amin(-1)
        bounds_B = bounds_B + (frozen_weights_BK * towards_BK * least_BK).sum(1)
    # The softmax's curvature is at most 1/2: beyond a step of 2 / curvature, each step multiplies what was missed.
    curvature_B = (gram_BKK * problem.weights_BK[:, None]).sum(2).amax(1) / 2
    growth_B = (max(step_sizes, default=0.0) * curvature_B - 1).clamp(min=1)
    return bounds_B * growth_B ** max(len(step_sizes) - 1, 0)


def _shifted(log_probabilities_BV: Tensor, words: MergedWords, shift_Bn: Tensor, targets_B: Tensor | None) -> Tensor:
    """Shift the logits of the listed and moved words and normalize; sums over the vocabulary only where it must."""
    mass_B, log_shifted_B = words.masses(log_probabilities_BV, shift_Bn)
    # log(1 - mass + shifted mass), from the two apart so that a large shift does not overflow
    others_B = 1 - mass_B
    small = (others_B < SMALL_MASS).nonzero()[:, 0]
    others_B = others_B.clamp(min=SMALL_MASS).log()
    if len(small):
        others_B[small] = _without(log_probabilities_BV[small], words.words_Bn[small], words.filled_Bn[small]).logsumexp(1)
    log_total_B = torch.logaddexp(others_B, log_shifted_B)
    if targets_B is not None:
        return pick(log_probabilities_BV, targets_B) + words.number_of(targets_B, shift_Bn) - log_total_B
    shift_Bn = shift_Bn.masked_fill(~words.filled_Bn, 0)
    return log_probabilities_BV.scatter_add(1, words.words_Bn, shift_Bn) - log_total_B[:, None]


def _without(log_probabilities_BV: Tensor, words_Bn: Tensor, filled_Bn: Tensor) -> Tensor:
    """Set the log-probabilities of the given words to -inf."""
    lowered_Bn = torch.where(filled_Bn, -torch.inf, 0.0).to(log_probabilities_BV.dtype)
    return log_probabilities_BV.scatter_add(1, words_Bn, lowered_Bn)
