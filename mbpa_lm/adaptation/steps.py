"""Gradient steps in the span of the neighbours, which need no copy of the weights.

The gradient with respect to W is sum_k (p_k - onehot(v_k)) w_k h_k^T, so every iterate of SGD, with momentum or without, is
W + sum_k a_k h_k^T, b + sum_k a_k with one vector a_k of S numbers a neighbour. The a_k are linear in the gradients of all
steps so far, and the one-hot values are the same in each, so

    a_k = w_k (n onehot(v_k) - r_k),   r <- (1 - alpha beta) r + alpha p(logits),   n <- (1 - alpha beta) n + alpha

with r_k a running sum of probabilities and n one number. With L0 the logits at the keys and G[j,k] = h_j . h_k + 1 (the 1 is
the bias),

    logits[j] = L0[j] + sum_k G[j,k] a_k.

Momentum gives r and n a velocity each, by the same linear rule.

Dimensions: `B` queries, `K` neighbours, `S` words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbpa_lm.adaptation import steps_compiled
from mbpa_lm.numerics.compiled import can_take

SPAN_OPTIMIZERS = ("sgd", "momentum")
"""Optimizers whose steps stay in the span of the neighbours."""

Number = float | Tensor
"""A float, or a scalar tensor that a gradient flows to."""


@dataclass(frozen=True)
class SpanSteps:
    """The vectors a_k = w_k (n onehot(v_k) - r_k) after all steps."""

    own: Number  # n
    probabilities_BKS: Tensor | None  # r, None for no step


def take_steps(
    logits_BKS: Tensor,
    gram_BKK: Tensor,
    weights_BK: Tensor,
    values_BK: Tensor,
    step_sizes: Sequence[Number],
    beta: Number = 0.0,
    momentum: float = 0.0,
    frozen_last: bool = False,
) -> SpanSteps:
    """Take one step for each step size. Differentiable in everything but the values.

    Args: values (B, K) are the neighbours' own words as places in S; with `frozen_last` the last of the S columns stands
    for words whose logits stay.
    """
    pull_BKK = gram_BKK * weights_BK[:, None]
    if (
        logits_BKS.dtype == torch.float32
        and not momentum
        and len(step_sizes)
        and _plain(logits_BKS, pull_BKK, *step_sizes, beta)
    ):
        sizes = [float(alpha) for alpha in step_sizes]
        return SpanSteps(0.0, _take_compiled_steps(logits_BKS, pull_BKK, values_BK, sizes, float(beta), frozen_last))
    own_BKS = _own_words(pull_BKK, values_BK, logits_BKS)
    logits, total, total_velocity = logits_BKS, None, None
    own: Number = 0.0
    own_velocity: Number = 0.0
    for step, alpha in enumerate(step_sizes):
        probabilities = torch.softmax(logits, dim=-1)
        if momentum:
            # velocity <- momentum * velocity + p - beta * total, and the same for n with 1 in the place of p
            own_velocity = momentum * own_velocity + 1 - beta * own
            direction = probabilities if total is None else probabilities - beta * total
            total_velocity = direction if total_velocity is None else direction + momentum * total_velocity
            total = _scaled(total_velocity, alpha) if total is None else _plus(total, total_velocity, alpha)
            own = own + alpha * own_velocity
        else:
            total = _scaled(probabilities, alpha) if total is None else _plus(_kept(total, alpha, beta), probabilities, alpha)
            own = own * (1 - alpha * beta) + alpha
        if step + 1 < len(step_sizes):
            logits = _plus(logits_BKS, own_BKS, own).baddbmm_(pull_BKK, total, alpha=-1)
            if frozen_last:
                logits[..., -1] = logits_BKS[..., -1]
    return SpanSteps(own, total)


def _plain(*numbers: Number) -> bool:
    """Say whether compiled loops can take the numbers, through which no gradient flows."""
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    return can_take(*tensors) and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _take_compiled_steps(
    logits_BKS: Tensor, pull_BKK: Tensor, values_BK: Tensor, step_sizes: list[float], beta: float, frozen_last: bool
) -> Tensor:
    """Return r_k - n onehot(v_k) as (B, K, S) after plain steps."""
    start_BKS, values_BK = logits_BKS.contiguous(), values_BK.contiguous()
    total_BKS, moved_BKS = torch.zeros_like(start_BKS), torch.zeros_like(start_BKS)
    for step, alpha in enumerate(step_sizes):
        if step:
            torch.bmm(pull_BKK, total_BKS, out=moved_BKS)
        arrays = (tensor.numpy() for tensor in (start_BKS, moved_BKS, values_BK))
        steps_compiled.step(*arrays, np.float32(1 - alpha * beta), np.float32(alpha), frozen_last, total_BKS.numpy())
    return total_BKS


def shift_at(towards_BK: Tensor, weights_BK: Tensor, values_BK: Tensor, steps: SpanSteps, words: int) -> Tensor:
    """Return what the steps add to the logits (B, S) of the words at a query: sum_k g[k] a_k, g[k] = h_k . q + 1."""
    pull_BK = towards_BK * weights_BK
    if steps.probabilities_BKS is None:
        return pull_BK.new_zeros(len(pull_BK), words)
    shift_BS = -(pull_BK[:, None] @ steps.probabilities_BKS)[:, 0, :words]
    return shift_BS.scatter_add(1, values_BK, pull_BK * steps.own)


def _own_words(pull_BKK: Tensor, values_BK: Tensor, logits_BKS: Tensor) -> Tensor:
    """Return sum_k pull[j,k] onehot(v_k) as (B, K, S)."""
    return torch.zeros_like(logits_BKS).scatter_add(2, values_BK[:, None].expand_as(pull_BKK), pull_BKK)


def _kept(total: Tensor, alpha: Number, beta: Number) -> Tensor:
    keep = 1 - alpha * beta
    return total if isinstance(keep, float) and keep == 1 else total * keep


def _plus(total: Tensor, other: Tensor, alpha: Number) -> Tensor:
    return torch.addcmul(total, other, alpha) if isinstance(alpha, Tensor) else torch.add(total, other, alpha=alpha)


def _scaled(tensor: Tensor, alpha: Number) -> Tensor:
    return tensor * alpha
