"""How large the output layer's gradients are on the training text: measured once a checkpoint, and kept with it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mbpa_lm.adaptation.slow_weights import GradientScale, GradientStatistics
from mbpa_lm.config import PersistentConfig
from mbpa_lm.errors import DataError
from mbpa_lm.models.base import LanguageModel, State

FILE = "gradient_scale.safetensors"


def gradient_scale(
    checkpoint_folder: Path,
    model: LanguageModel,
    training_tokens: Callable[[], np.ndarray],
    config: PersistentConfig,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> GradientScale:
    """Return the kept scale where it was measured in the same way, and measure and keep it otherwise.

    Args: training_tokens opens the text when it is needed. Raises DataError where the text is shorter than an interval.
    """
    settings = json.dumps({"interval": config.interval, "tokens": config.statistics_tokens})
    path = checkpoint_folder / FILE
    kept = _read(path, settings, model)
    if kept is not None:
        return kept
    scale = _measure(model, training_tokens()[: config.statistics_tokens + 1], config.interval, on_progress)
    _write(path, settings, scale)
    return scale


@torch.no_grad()
def _measure(model: LanguageModel, tokens: np.ndarray, interval: int, on_progress: Callable[[int], None]) -> GradientScale:
    if len(tokens) <= interval:
        raise DataError(f"the training text has {len(tokens)} tokens, persistent.interval is {interval}; make it smaller")
    layer = model.output_layer()
    statistics = GradientStatistics(layer.weight, layer.bias)
    state: State | None = None
    for begin in range(0, len(tokens) - interval, interval):
        read = torch.from_numpy(tokens[begin : begin + interval + 1].astype(np.int64)).to(layer.weight.device)
        output = model(read[None, :-1], state)
        state = output.state
        statistics.add(output.hidden_states[0], read[1:])
        on_progress(begin + interval)
    return statistics.scale()


def _read(path: Path, settings: str, model: LanguageModel) -> GradientScale | None:
    weight = model.output_layer().weight
    try:
        with safe_open(path, framework="pt", device=str(weight.device)) as file:
            if (file.metadata() or {}).get("settings") != settings:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None
    if tensors.get("weight", torch.empty(0)).shape != weight.shape:
        return None
    return GradientScale(tensors["weight"], tensors.get("bias"))


def _write(path: Path, settings: str, scale: GradientScale) -> None:
    """Keep the scale beside the checkpoint; where that cannot be written, it is measured again next time."""
    tensors = {"weight": scale.weight_Vd} if scale.bias_V is None else {"weight": scale.weight_Vd, "bias": scale.bias_V}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {"settings": settings})
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
