"""The arithmetic of training: float32, or bfloat16 where the processor is faster in it."""

import torch

from mbpa_lm.errors import ConfigError
from mbpa_lm.models.build import Model
from mbpa_lm.system.machine import bfloat16_is_faster

LOSS_SCALE = 1024.0
"""What a loss is multiplied by where its gradient may pass through float16; a power of two, so that nothing is rounded."""


def choose_precision(wanted: str, model: Model, device: torch.device) -> str:
    """Return float32 or bfloat16; raises ConfigError where bfloat16 is wanted and the processor cannot run the model in it."""
    if wanted == "auto":
        return "bfloat16" if bfloat16_is_faster(device) and _runs_in_bfloat16(model, device) else "float32"
    if wanted == "bfloat16" and not _runs_in_bfloat16(model, device):
        raise ConfigError("training.precision is bfloat16, which this processor cannot run the model in; use auto or float32")
    return wanted


@torch.no_grad()
def _runs_in_bfloat16(model: Model, device: torch.device) -> bool:
    """Try it: oneDNN has no bfloat16 LSTM on processors without AVX512."""
    try:
        with torch.autocast(device.type, torch.bfloat16):
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
    except RuntimeError:
        return False
    return True


def loss_scale(precision: str, device: torch.device) -> float:
    """Return what to multiply the loss by before its gradient is taken.

    On CUDA, autocast runs cuDNN's LSTM in float16 even where bfloat16 is asked for, which makes small gradients zero.
    """
    return LOSS_SCALE if precision == "bfloat16" and device.type == "cuda" else 1.0
