"""The training loss over the whole vocabulary without a (positions x vocabulary) matrix in memory.

Logits are made for some positions at a time and turned at once into their share of the gradient, so that what is kept is one
gradient of the layer, not the logits of a batch: at 267,735 words and 1,600 positions 0.4 GB instead of 3.4 GB.
Nothing is computed twice, so it costs no more operations than the plain loss.

`torch.nn.functional.linear_cross_entropy` does the same since PyTorch 2.13; on CPUs it is several times as slow
(benchmarks/training.py measures both), and older versions do not have it.

Dimensions: `N` positions, `P` of them at a time, `V` vocabulary, `d` hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from mbpa_lm.models.base import OutputLayer

LOGITS_AT_ONCE = 1 << 26
LEAST_PROBABILITY = 1e-37
"""What a target's probability counts as where it is zero in the loss that is reported; its gradient is the true one."""


def chunked_cross_entropy(
    layer: OutputLayer, hidden_states_Nd: Tensor, targets_N: Tensor, dtype: torch.dtype, logits_at_once: int = LOGITS_AT_ONCE
) -> Tensor:
    """Return the mean loss () float32 in nats of targets (N,) int64; products are made in `dtype`, sums in float32 or wider.

    The layer must not cap its logits.
    """
    positions = max(1, logits_at_once // layer.weight.shape[0])
    mean: Tensor = _MeanLoss.apply(hidden_states_Nd, layer.weight, layer.bias, targets_N, dtype, positions)
    return mean


@torch.no_grad()
def target_losses(layer: OutputLayer, hidden_states_Nd: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the loss (N,) float32 in nats of each target, without a gradient."""
    positions = max(1, LOGITS_AT_ONCE // layer.weight.shape[0])
    weight_Vd, bias_V = layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
    losses = []
    with torch.autocast(hidden_states_Nd.device.type, enabled=False):
        for hidden_Pd, targets_P in zip(hidden_states_Nd.split(positions), targets_N.split(positions), strict=True):
            logits_PV = torch.nn.functional.linear(hidden_Pd.to(dtype), weight_Vd, bias_V).float()
            losses.append(logits_PV.logsumexp(-1) - logits_PV.gather(1, targets_P[:, None])[:, 0])
    return torch.cat(losses)


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden_states_Nd: Tensor,
        weight_Vd: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        dtype: torch.dtype,
        positions: int,
    ) -> Tensor:
        sum_type = torch.promote_types(dtype, torch.float32)
        low_weight_Vd, low_bias_V = weight_Vd.to(dtype), None if bias_V is None else bias_V.to(dtype)
        weight_gradient_Vd = torch.zeros_like(weight_Vd, dtype=sum_type)
        bias_gradient_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=sum_type)
        hidden_gradient_Nd = torch.empty_like(hidden_states_Nd)
        total = torch.zeros((), dtype=sum_type, device=weight_Vd.device)
        with torch.autocast(weight_Vd.device.type, enabled=False):
            for start in range(0, len(targets_N), positions):
                part = slice(start, start + positions)
                hidden_Pd, targets_P = hidden_states_Nd[part].to(dtype), targets_N[part, None]
                probabilities_PV = torch.nn.functional.linear(hidden_Pd, low_weight_Vd, low_bias_V).softmax(-1)
                total -= probabilities_PV.gather(1, targets_P).to(sum_type).clamp_min(LEAST_PROBABILITY).log().sum()
                errors_PV = probabilities_PV.scatter_add_(1, targets_P, probabilities_PV.new_full(targets_P.shape, -1))
                hidden_gradient_Nd[part] = errors_PV @ low_weight_Vd
                weight_gradient_Vd += errors_PV.T @ hidden_Pd
                if bias_gradient_V is not None:  # as a product: a sum down the columns takes several times as long
                    bias_gradient_V += (errors_PV.new_ones(1, len(targets_P)) @ errors_PV)[0]
        context.gradients = (hidden_gradient_Nd, weight_gradient_Vd, bias_gradient_V)
        context.count = len(targets_N)
        mean: Tensor = total / len(targets_N)
        return mean

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream.item() / context.count
        hidden_states, weight, bias = (None if gradient is None else gradient.mul_(scale) for gradient in context.gradients)
        del context.gradients  # a second backward pass would scale them twice: it fails instead
        return hidden_states, weight, bias, None, None, None
