"""What a checkpoint holds beside the weights so that training goes on as if it had never stopped, and how it is put back.

Optimizer, random numbers, position, counts of the Hebbian rule, and the recurrent state of all rows: nothing in it depends on
how many processes trained, or on how they shared the weights.
"""

import shlex
import sys
from dataclasses import asdict

import torch
from torch import Tensor
from torch.optim import Optimizer

from mbpa_lm.checkpoints.checkpoint import TrainingPosition
from mbpa_lm.config import Config
from mbpa_lm.models.base import State
from mbpa_lm.models.build import Model
from mbpa_lm.system.machine import code_commit, describe_machine
from mbpa_lm.system.processes import Processes
from mbpa_lm.training.hebbian import HebbianRule
from mbpa_lm.training.optimization import has_averaged_weights, load_state, split_state
from mbpa_lm.training.position import Position, read_position


def pack(
    config: Config,
    position: Position,
    optimizer: Optimizer,
    state: State,
    hebbian: HebbianRule,
    processes: Processes,
) -> TrainingPosition:
    """Return the state of training as tensors and plain values; every process must call it."""
    tensors, plain = split_state(optimizer)
    packed = {f"optimizer.{name}": tensor for name, tensor in processes.whole(tensors).items()}
    packed["random"] = torch.get_rng_state()
    if processes.device.type == "cuda":
        packed["random_cuda"] = torch.cuda.get_rng_state(processes.device)
    for index, tensor in enumerate(state or ()):
        packed[f"state.{index}"] = processes.joined(tensor.detach(), 1).contiguous()
    if has_averaged_weights(optimizer):
        packed |= {f"weights.{index}": weight.detach().clone() for index, weight in enumerate(_weights(optimizer))}
    if hebbian.limit:
        packed["hebbian"] = hebbian.seen_V
    values = {
        "position": asdict(position),
        "optimizer": plain,
        "training": asdict(config.training),
        "seed": config.run.seed,
        "command": shlex.join(sys.argv),
        "commit": code_commit(),
        "machine": describe_machine(processes.device),
    }
    return TrainingPosition(packed, values)


def restore(
    saved: TrainingPosition, model: Model, optimizer: Optimizer, hebbian: HebbianRule, processes: Processes
) -> tuple[Position, State]:
    """Put back what `pack` returned, and return the position and this process's part of the recurrent state.

    Raises ConfigError, RuntimeError or one of DAMAGES where it is of another model, or damaged.
    """
    tensors, values = saved.tensors, saved.values
    position = read_position(values["position"])
    load_state(optimizer, _strip(tensors, "optimizer."), values["optimizer"])
    if has_averaged_weights(optimizer):
        for index, weight in enumerate(_weights(optimizer)):
            _put_back(f"weights.{index}", tensors[f"weights.{index}"], weight)
    if hebbian.limit:
        _put_back("hebbian", tensors["hebbian"], hebbian.seen_V)
    state = _state(model, _strip(tensors, "state."), values["training"]["batch_size"], processes)
    torch.set_rng_state(tensors["random"])
    if processes.device.type == "cuda" and "random_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random_cuda"], processes.device)
    return position, state


@torch.no_grad()
def _put_back(name: str, saved: Tensor, target: Tensor) -> None:
    if saved.shape != target.shape or saved.dtype != target.dtype:
        raise ValueError(f"{name} is of {saved.dtype} and {tuple(saved.shape)}, not of {tuple(target.shape)}")
    target.copy_(saved)


@torch.no_grad()
def _state(model: Model, saved: dict[str, Tensor], sequences: int, processes: Processes) -> State:
    """Return this process's part of a recurrent state of the shapes that the model's own has after a token."""
    if not saved or not model.carries_state_in_training:
        return None
    parts = [saved[str(index)].to(processes.device) for index in range(len(saved))]
    tokens = torch.zeros(sequences, 1, dtype=torch.int64, device=processes.device)
    shapes = [tensor.shape for tensor in model.eval()(tokens).state]
    if [part.shape for part in parts] != shapes or not all(part.is_floating_point() for part in parts):
        raise ValueError(
            f"its recurrent state is of {[tuple(part.shape) for part in parts]}, not of {list(map(tuple, shapes))}"
        )
    return tuple(part[:, processes.rows(sequences)].contiguous() for part in parts)


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return list(optimizer.param_groups[0]["params"])


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
