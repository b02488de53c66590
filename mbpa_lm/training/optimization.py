"""Optimizers and learning-rate schedules, and how an optimizer's state becomes tensors and JSON and back."""

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, AdamW, Optimizer

from mbpa_lm.config import TrainingConfig
from mbpa_lm.system.processes import Processes, sharded_like
from mbpa_lm.training.precision import loss_scale

NOT_YET = 10**12
"""Step at which ASGD would start to average if validation never stopped improving."""

STATE_TENSORS = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, SGD: set[str](), ASGD: {"step", "eta", "mu", "ax"}}
SCALARS = ("step", "eta", "mu")
"""What optimizers remember of each weight, and what of it is a single number; all else is of the weight's shape."""

FINAL_FACTOR = 1e-4
"""Learning rate at the end of a decay, as a share of the highest."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """Build the optimizer of a model's parameters; momentum settings follow the published AWD-LSTM recipes."""
    parameters, rate, decay = list(model.parameters()), config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    if config.optimizer == "sgd":
        return SGD(parameters, lr=rate, weight_decay=decay)
    return ASGD(parameters, lr=rate, lambd=0.0, t0=NOT_YET, weight_decay=decay)


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of step `step` of `steps`, counted from 0."""
    return config.learning_rate * _factor(step / steps, config.schedule, config.warmup_fraction)


def _factor(done: float, schedule: str, warmup: float) -> float:
    if done < warmup:
        rise = done / warmup
        return 0.04 + 0.96 * _cosine(1 - rise) if schedule == "one_cycle" else rise
    fall = (done - warmup) / (1 - warmup)
    if schedule == "constant":
        return 1.0
    shape = 1 - fall if schedule == "linear" else _cosine(fall)
    return FINAL_FACTOR + (1 - FINAL_FACTOR) * shape


def _cosine(fall: float) -> float:
    """Fall from 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * fall)) / 2


def take_step(
    model: nn.Module, optimizer: Optimizer, loss: Tensor, precision: str, longest: float, processes: Processes
) -> float:
    """Step down the gradient of a loss (), shortened to `longest` (0: never), and return how long it was before."""
    scale = loss_scale(precision, processes.device)
    optimizer.zero_grad(set_to_none=True)
    (loss * scale).backward()
    if scale != 1:
        torch._foreach_div_([weight.grad for weight in model.parameters() if weight.grad is not None], scale)
    norm = processes.shorten_gradients(model, longest or math.inf)
    optimizer.step()
    return norm


def start_averaging(optimizer: Optimizer) -> None:
    """Begin the weight average of ASGD at the present step, unless it has begun."""
    for group in optimizer.param_groups:
        if group["t0"] == NOT_YET:
            steps = [int(optimizer.state[parameter]["step"]) for parameter in group["params"]]
            group["t0"] = max(steps)


def has_averaged_weights(optimizer: Optimizer) -> bool:
    """Say whether the weight average of ASGD has begun."""
    return any(group.get("t0", NOT_YET) != NOT_YET for group in optimizer.param_groups)


@contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Put ASGD's averaged weights into the model for the length of the block; other optimizers have none."""
    swaps = [
        (parameter, optimizer.state[parameter]["ax"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group.get("t0", NOT_YET) != NOT_YET
    ]
    trained = [parameter.detach().clone() for parameter, _ in swaps]
    with torch.no_grad():
        for parameter, average in swaps:
            parameter.copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), weights in zip(swaps, trained, strict=True):
                parameter.copy_(weights)


def split_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into named tensors and plain values."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": tensor for index, entries in state["state"].items() for name, tensor in entries.items()}
    return tensors, {"groups": state["param_groups"]}


def load_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Give an optimizer what `split_state` split, with whole tensors.

    Of the plain values it takes when averaging began; the others are the configuration's. Raises ValueError or another of
    DAMAGES where it is of another model or optimizer: a fused step would write past the end of a tensor that is too short.
    """
    weights, state = optimizer.param_groups[0]["params"], defaultdict[int, dict[str, Tensor]](dict)
    wanted = STATE_TENSORS[type(optimizer)]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        weight = weights[range(len(weights)).index(int(index))]  # which refuses what counts from the end
        shape = torch.Size() if name in SCALARS else weight.shape
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{key} is of {tensor.dtype} and {tuple(tensor.shape)}, for a weight of {tuple(weight.shape)}")
        if name in SCALARS and not 0 <= float(tensor) < math.inf:
            raise ValueError(f"{key} is {float(tensor)}")
        state[int(index)][name] = sharded_like(tensor, weight)
    if any(set(entries) != wanted for entries in state.values()):
        raise ValueError(f"the state of each weight must be {', '.join(sorted(wanted)) or 'empty'}")
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, plain["groups"], strict=True):
        if "t0" in group:
            group["t0"] = operator.index(saved["t0"])
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
