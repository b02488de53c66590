"""How large gradients are on the training text, by parameter: measured once a checkpoint, and kept with it.

Of the output layer alone, for persistent adaptation, and of the whole model, for dynamic evaluation.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy

from mbpa_lm.adaptation.slow_weights import GradientScale, GradientStatistics
from mbpa_lm.config import DynamicConfig, PersistentConfig
from mbpa_lm.errors import DataError
from mbpa_lm.models.base import LanguageModel, State
from mbpa_lm.models.build import Model
from mbpa_lm.models.gradients import read_with_gradients
from mbpa_lm.system.tensor_files import save_tensors

LAYER_FILE, MODEL_FILE = "gradient_scale.safetensors", "model_gradient_scale.safetensors"
OnProgress = Callable[[int], None]


def gradient_scale(
    checkpoint_folder: Path,
    model: LanguageModel,
    training_tokens: Callable[[], np.ndarray],
    config: PersistentConfig,
    on_progress: OnProgress = lambda tokens: None,
) -> GradientScale:
    """Return the output layer's kept scale where it was measured in the same way, and measure and keep it otherwise.

    Args: training_tokens opens the text when it is needed. Raises DataError where the text is shorter than an interval.
    """
    layer = model.output_layer()
    shapes = {"weight": layer.weight.shape} if layer.bias is None else {"weight": layer.weight.shape, "bias": layer.bias.shape}

    def measure(tokens: np.ndarray) -> dict[str, Tensor]:
        scale = _measure_layer(model, tokens, config.interval, on_progress)
        return {"weight": scale.weight_Vd} if scale.bias_V is None else {"weight": scale.weight_Vd, "bias": scale.bias_V}

    kept = _kept(checkpoint_folder / LAYER_FILE, "persistent", config, shapes, layer.weight.device, training_tokens, measure)
    return GradientScale(kept["weight"], kept.get("bias"))


def model_gradient_scale(
    checkpoint_folder: Path,
    model: Model,
    training_tokens: Callable[[], np.ndarray],
    config: DynamicConfig,
    on_progress: OnProgress = lambda tokens: None,
) -> dict[str, Tensor]:
    """Return the scale of every parameter of the model, by name; otherwise like `gradient_scale`."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def measure(tokens: np.ndarray) -> dict[str, Tensor]:
        return _measure_model(model, tokens, config.interval, on_progress)

    device = model.output_layer().weight.device
    return _kept(checkpoint_folder / MODEL_FILE, "dynamic", config, shapes, device, training_tokens, measure)


def _pieces(
    model: LanguageModel, tokens: np.ndarray, interval: int, on_progress: OnProgress
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read the text and give the hidden states and the next tokens of each interval."""
    device = model.output_layer().weight.device
    state: State | None = None
    for begin in range(0, len(tokens) - interval, interval):
        read = torch.from_numpy(tokens[begin : begin + interval + 1].astype(np.int64)).to(device)
        if torch.is_grad_enabled():
            output, state = read_with_gradients(model, read[None, :-1], state)
        else:
            output = model(read[None, :-1], state)
            state = output.state
        yield output.hidden_states[0], read[1:]
        on_progress(begin + interval)


@torch.no_grad()
def _measure_layer(model: LanguageModel, tokens: np.ndarray, interval: int, on_progress: OnProgress) -> GradientScale:
    layer = model.output_layer()
    statistics = GradientStatistics(layer.weight, layer.bias)
    for hidden_states, targets in _pieces(model, tokens, interval, on_progress):
        statistics.add(hidden_states, targets)
    return statistics.scale()


@torch.enable_grad()
def _measure_model(model: Model, tokens: np.ndarray, interval: int, on_progress: OnProgress) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    for hidden_states, targets in _pieces(model, tokens, interval, on_progress):
        loss = cross_entropy(model.output_layer().logits(hidden_states), targets)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    squares[name].addcmul_(gradient, gradient)
        count += 1
    return {name: (square / count).sqrt() for name, square in squares.items()}


def _kept(
    path: Path,
    section: str,
    config: PersistentConfig | DynamicConfig,
    shapes: dict[str, torch.Size],
    device: torch.device,
    training_tokens: Callable[[], np.ndarray],
    measure: Callable[[np.ndarray], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Read tensors of the given shapes that were measured with the same settings, or measure and keep them."""
    settings = json.dumps({"interval": config.interval, "tokens": config.statistics_tokens})
    kept = _read(path, settings, device)
    if {name: tensor.shape for name, tensor in kept.items()} != shapes:
        tokens = training_tokens()
        if len(tokens) <= config.interval:
            raise DataError(
                f"the training text has {len(tokens)} tokens, {section}.interval is {config.interval}; make it smaller"
            )
        kept = measure(tokens[: config.statistics_tokens + 1])
        _write(path, settings, kept)
    return kept


def _read(path: Path, settings: str, device: torch.device) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = file.metadata() or {}
            if found.get("settings") != settings:
                return {}
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return kept if all(map(_is_scale, kept.values())) and found.get("sha256") == _hash(kept) else {}
    except (OSError, SafetensorError):
        return {}


def _is_scale(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(((tensor >= 0) & torch.isfinite(tensor)).all())


def _hash(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _write(path: Path, settings: str, tensors: dict[str, Tensor]) -> None:
    """Keep the scale beside the checkpoint; where that cannot be written, it is measured again next time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        found = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors(found, temporary, {"settings": settings, "sha256": _hash(found)})
        os.replace(temporary, path)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
