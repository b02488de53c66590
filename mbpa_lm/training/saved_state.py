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

from mbpa_lm.checkpoint import TrainingPosition
from mbpa_lm.config import Config
from mbpa_lm.machine import code_commit, describe_machine
from mbpa_lm.models.base import State
from mbpa_lm.processes import Processes
from mbpa_lm.training.hebbian import HebbianRule
from mbpa_lm.training.optimization import has_averaged_weights, join_state, load_state, split_state
from mbpa_lm.training.position import Position


def pack(
    config: Config,
    position: Position,
    optimizer: Optimizer,
    state: State,
    hebbian: HebbianRule,
    processes: Processes,
) -> TrainingPosition:
    """Return the state of training as tensors and plain values; every process must call it."""
    tensors, plain = split_state(optimizer.state_dict())
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
    saved: TrainingPosition, optimizer: Optimizer, hebbian: HebbianRule, processes: Processes
) -> tuple[Position, State]:
    """Put back what `pack` returned, and return the position and this process's part of the recurrent state.

    Raises KeyError, TypeError, ValueError or RuntimeError where it is of another model, or damaged.
    """
    tensors, values = saved.tensors, saved.values
    load_state(optimizer, join_state(_strip(tensors, "optimizer."), values["optimizer"]))
    if has_averaged_weights(optimizer):
        with torch.no_grad():
            for index, weight in enumerate(_weights(optimizer)):
                weight.copy_(tensors[f"weights.{index}"])
    if hebbian.limit:
        hebbian.seen_V.copy_(tensors["hebbian"])
    torch.set_rng_state(tensors["random"])
    if processes.device.type == "cuda" and "random_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random_cuda"], processes.device)
    state = _strip(tensors, "state.")
    rows = [state[str(index)].to(processes.device) for index in range(len(state))]
    mine: list[Tensor] = [tensor[:, processes.rows(tensor.shape[1])].contiguous() for tensor in rows]
    return Position(**values["position"]), tuple(mine) or None


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return list(optimizer.param_groups[0]["params"])


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
