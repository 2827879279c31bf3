"""One process or several (torchrun): the only place that knows about ranks."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from lab.device import pick_device

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Process:
    """Device, world size and rank of this process.

    Every method is a no-op in a lone process. In several processes all of them must call it.
    """

    device: torch.device
    world: int = 1
    rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Return which of n items belong to this process: equal contiguous parts."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value: object) -> object:
        """Return the first process's value."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the tensor up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def max(self, *values: float) -> list[float]:
        """Return the largest of each value over all processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64).to(self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model such that its gradients are averaged over all processes."""
        return nn.parallel.DistributedDataParallel(model) if self.world > 1 else model


@contextlib.contextmanager
def launch(device: str, *, backend: str = "gloo", timeout: timedelta) -> Iterator[Process]:
    """Join the processes that torchrun started; without torchrun, this is the only one.

    Args:
        device: the value of --device.
        backend: "nccl" if all-reduced tensors live on GPUs. Ignored on a CPU.
        timeout: how long a process waits for the others.

    Raises:
        UserError: the device cannot be used.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    process = Process(pick_device(device), world, rank)
    if world > 1:
        backend = backend if process.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield process
    finally:
        if world > 1:
            dist.destroy_process_group()
