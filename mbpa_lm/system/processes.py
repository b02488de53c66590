"""The processes that work together: this one alone, or as many as `accelerate launch` started.

In training each reads its own equal group of the batch's rows, so a carried state never leaves its process; gradients are
averaged over all before a step. What is random is drawn alike in every process, for all rows where it differs by row, so that
the weights are those that one process would have come to with the whole batch, up to the rounding of sums. In evaluation each
reads whole documents.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mbpa_lm.errors import ConfigError
from mbpa_lm.system.machine import pick_device
from mbpa_lm.system.progress import console


class Processes:
    """This process among those that work together."""

    def __init__(self, wanted_device: str) -> None:
        """Join the others, where there are any, on the device that `wanted_device` (auto, cpu or cuda) stands for."""
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._accelerator: Any = None
        if self.count == 1:
            self.device = pick_device(wanted_device)
            return
        from accelerate import Accelerator

        self._accelerator = Accelerator(cpu=pick_device(wanted_device).type == "cpu")
        self.device = self._accelerator.device
        if wanted_device == "cuda" and self.device.type != "cuda":
            raise ConfigError(
                f"run.device is cuda, but accelerate gave process {self.rank} {self.device}; launch with --gpu_ids"
            )
        console.quiet = not self.is_first

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of the weights only, as a launch with `--use_fsdp` asks for."""
        return self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    def prepare(self, objective: nn.Module, blocks: Collection[str], low_precision: bool) -> nn.Module:
        """Return what to call in place of the objective, so that gradients are averaged over all processes.

        Sharded weights are put together for one module of a class in `blocks` at a time, in bfloat16 for `low_precision`. It is
        done here and not by accelerate, which does it on accelerators only: so it is tested on CPUs too.
        """
        if self.count == 1:
            return objective
        if not self.shards_weights:
            wrapped: nn.Module = self._accelerator.prepare(objective)
            return wrapped
        mesh = init_device_mesh(self.device.type, (self.count,))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low_precision else MixedPrecisionPolicy()
        for module in list(objective.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, mp_policy=policy)
        return objective

    def rows(self, count: int) -> slice:
        """Return this process's share of `count` rows, as equal as can be."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all processes, the same in every one."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(summed)
        return [float(value) for value in summed.tolist()]

    def total_array(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of an array over all processes, the same in every one; exact where all but one give zeros."""
        if self.count == 1:
            return array
        summed = torch.from_numpy(array).to(self.device)
        distributed.all_reduce(summed)
        return summed.cpu().numpy()

    def joined(self, rows: Tensor, dim: int) -> Tensor:
        """Return the rows of all processes in order; each must hold as many."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts, dim)

    def check_equal(self, what: str, value: str) -> None:
        """Raise ConfigError where `value`, a hash, is not the same in every process."""
        number = float(int(value[:12], 16))
        if self.total([number])[0] != number * self.count:
            raise ConfigError(f"{what} is not the same in every process; give all of them the same files and settings")

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            distributed.barrier()

    def shorten_gradients(self, model: nn.Module, longest: float) -> float:
        """Shorten the gradient of all weights together to `longest` and return how long it was."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), longest)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Draw other numbers than the other processes within the block, and the same as they again after it."""
        if self.count == 1:
            yield
            return
        seed = int(torch.randint(1 << 62, ()))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors on the CPU, sharded ones put together; every process must ask, the first alone gets them."""
        found = {}
        for name, tensor in tensors.items():
            complete = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_first:
                found[name] = complete.detach().cpu().contiguous()
        return found


def sharded_like(whole: Tensor, weight: Tensor) -> Tensor:
    """Return this process's part of a tensor that belongs to a weight, all of it where the weight is not sharded."""
    if isinstance(weight, DTensor) and whole.shape == weight.shape:
        return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements)
    return whole
