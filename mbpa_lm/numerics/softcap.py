"""Soft-capped logits, as Gemma 2 has them."""

import torch
from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits under a soft cap, c tanh(logit / c), as they are where there is none."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
