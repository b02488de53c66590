"""Step sizes, pull back, kernel, metric and share, fitted by gradient descent through the unrolled steps.

The loss is the mean negative log-probability of the true next words, mixed from the adapted layer's, as the restricted solver
computes it, and the base model's, with the true word among the moved ones. The neighbours of each example are chosen again,
from more candidates, as the metric changes. Everything that does not depend on what is fitted is computed once.

Dimensions: `N` examples, `B` of them at once, `n` candidates, `K` neighbours, `S` moved words, `T` steps, `d` hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mbpa_lm.adaptation.kernels import gaussian, inverse_distance, stretched_distances, within_reach
from mbpa_lm.adaptation.moved_words import choose_moved_words
from mbpa_lm.adaptation.problem import Problem
from mbpa_lm.adaptation.products import span_products
from mbpa_lm.adaptation.steps import shift_at, take_steps

MOVED_WORDS = 32


@dataclass(frozen=True)
class Examples:
    """Predictions of a held-out text whose loss the fit lowers."""

    keys_Nnd: Tensor
    queries_Nd: Tensor
    absent_Nn: Tensor  # bool: whether there is no candidate at the place
    towards_Nn: Tensor
    gram_Nnn: Tensor
    own_Nn: Tensor  # the neighbours' words as places in S
    logits_NnS1: Tensor
    target_N: Tensor  # the true words as places in S
    log_probabilities_NS1: Tensor  # at the queries, of the moved words and, last, of all others

    def rows(self, rows: Tensor) -> "Examples":
        """Return some of the examples."""
        return Examples(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Fit:
    """What is fitted; each number is kept positive through its logarithm, the share between 0 and 1."""

    log_steps_T: Tensor
    log_beta: Tensor
    log_width: Tensor  # epsilon or bandwidth^2, in squared typical distances
    log_reach: Tensor  # in typical distances
    log_metric_d: Tensor
    logit_share: Tensor  # of the adapted prediction; the rest is the base model's

    def step_sizes(self, longest: float) -> Tensor:
        """Return the steps (T,), none longer than `longest`."""
        return self.log_steps_T.exp().clamp(max=longest)

    def parameters(self) -> list[Tensor]:
        """Return all of them."""
        return [getattr(self, field.name) for field in fields(self)]

    def detached(self) -> "Fit":
        """Return a copy of the numbers as they are now."""
        return Fit(*(tensor.detach().clone() for tensor in self.parameters()))


@torch.no_grad()
def prepare_examples(problem: Problem, targets_B: Tensor, absent_Bn: Tensor, adapt_bias: bool) -> Examples:
    """Compute what stays the same during the fit; problem.weights are those that the moved words are chosen by."""
    base = problem.base
    assert base is not None
    towards_Bn, gram_Bnn = span_products(problem, adapt_bias)
    moved = choose_moved_words(problem, problem.weights_BK * towards_Bn, MOVED_WORDS, targets_B[:, None])
    words_BS = moved.words.words_Bn.gather(1, moved.places_BS)
    log_probabilities_BS = base.log_probabilities_BV.gather(1, words_BS).masked_fill(~moved.filled_BS, -torch.inf)
    log_rest_B = (1 - log_probabilities_BS.exp().sum(1)).clamp(min=1e-9).log()
    # A word stands at one place only, so that the largest match is the match.
    target_B = ((words_BS == targets_B[:, None]) & moved.filled_BS).int().argmax(1)
    return Examples(
        problem.keys_BKd,
        problem.queries_Bd,
        absent_Bn,
        towards_Bn,
        gram_Bnn,
        moved.own_BK,
        moved.logits_BKS1,
        target_B,
        torch.cat([log_probabilities_BS, log_rest_B[:, None]], dim=1),
    )


def typical_squared_distance(examples: Examples) -> float:
    """Return the median squared distance of the candidates."""
    distances_Nn = (examples.keys_Nnd - examples.queries_Nd[:, None]).square().sum(-1)
    return float(distances_Nn[~examples.absent_Nn].median())


def of_targets(examples: Examples) -> Tensor:
    """Return the base log-probability of each true word (N,)."""
    return examples.log_probabilities_NS1.gather(1, examples.target_N[:, None])[:, 0]


def mixed_losses(
    examples: Examples, fit: Fit, neighbours: int, typical: float, is_gaussian: bool, longest_step: float
) -> Tensor:
    """Return minus the log-probability of each true word (B,) in the mixture with the base model, differentiable in the fit."""
    adapted_B = -adapted_losses(examples, fit, neighbours, typical, is_gaussian, longest_step)
    log_share, log_rest = logsigmoid(fit.logit_share), logsigmoid(-fit.logit_share)
    return -torch.logaddexp(of_targets(examples) + log_rest, adapted_B + log_share)


def adapted_losses(
    examples: Examples, fit: Fit, neighbours: int, typical: float, is_gaussian: bool, longest_step: float
) -> Tensor:
    """Return minus the adapted log-probability of each true word (B,), differentiable in the fit."""
    distances_Bn = stretched_distances(examples.keys_Nnd, examples.queries_Nd, fit.log_metric_d.exp())
    distances_Bn = distances_Bn.masked_fill(examples.absent_Nn, torch.inf)
    columns = distances_Bn.detach().topk(min(neighbours, distances_Bn.shape[1]), largest=False).indices  # (B, K)
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    squared_BK = distances_Bn.gather(1, columns) / typical
    width = fit.log_width.exp()
    kernel = gaussian((width / 2).sqrt()) if is_gaussian else inverse_distance(width)
    absent_BK = examples.absent_Nn.gather(1, columns)
    weights_BK = within_reach(kernel, fit.log_reach.exp())(squared_BK.masked_fill(absent_BK, 1e12)).masked_fill(absent_BK, 0)
    steps = take_steps(
        examples.logits_NnS1[rows, columns],
        examples.gram_Nnn[rows[..., None], columns[:, :, None], columns[:, None]],
        weights_BK,
        examples.own_Nn.gather(1, columns),
        list(fit.step_sizes(longest_step)),
        fit.log_beta.exp(),
        frozen_last=True,
    )
    moved = examples.log_probabilities_NS1.shape[1] - 1
    towards_BK = examples.towards_Nn.gather(1, columns)
    shifts_BS = shift_at(towards_BK, weights_BK, examples.own_Nn.gather(1, columns), steps, moved)
    logits_BS1 = examples.log_probabilities_NS1 + torch.nn.functional.pad(shifts_BS, (0, 1))
    return -torch.log_softmax(logits_BS1, dim=1).gather(1, examples.target_N[:, None])[:, 0]


def fit_by_gradient_descent(
    start: Fit,
    loss: Callable[[Fit, Tensor], Tensor],
    examples: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    on_epoch: Callable[[int, Fit], None],
) -> None:
    """Lower loss(fit, rows) over all rows with Adam, on a half-cosine of the learning rate; tell each epoch's fit."""
    fit = start.detached()
    for parameter in fit.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(fit.parameters(), lr=learning_rate)
    batches = -(-examples // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for rows in torch.randperm(examples, generator=generator).split(batch_size):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(fit, rows).mean().backward()
            optimizer.step()
            schedule.step()
        on_epoch(epoch + 1, fit)
