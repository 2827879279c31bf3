"""One process or several (torchrun), and what they do together."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from lab.device import pick_device
from lab.errors import UserError, one_line

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Process:
    """Device, world size and rank of this process.

    `barrier`, `agree`, `any` and `sum` do nothing in a lone process. If there are several, all of
    them must call the method.
    """

    device: torch.device
    world: int = 1
    rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    @property
    def on_this_node(self) -> int:
        """How many of the processes are on this node, as torchrun says."""
        with contextlib.suppress(ValueError):
            return int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        return self.world

    def share(self, n: int) -> range:
        """Return which of n items belong to this process: equal contiguous parts."""
        return share(n, self.rank, self.world)

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

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return (
            bool(self.sum(torch.tensor(int(flag), device=self.device))) if self.world > 1 else flag
        )

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model such that its gradients are averaged over all processes."""
        return nn.parallel.DistributedDataParallel(model) if self.world > 1 else model


def share(n: int, i: int, parts: int) -> range:
    """Return part i of n items, which are cut into contiguous parts of nearly equal size."""
    return range(n * i // parts, n * (i + 1) // parts)


@contextlib.contextmanager
def launch(device: str, *, backend: str = "gloo", timeout: timedelta) -> Iterator[Process]:
    """Join the processes that torchrun started; without torchrun, this is the only one.

    Args:
        device: the value of --device.
        backend: "nccl" if all-reduced tensors live on GPUs. Ignored on a CPU.
        timeout: how long a process waits for the others.

    Raises:
        UserError: the device cannot be used, the environment is not one that torchrun makes, or the
            processes do not find each other.
    """
    world, rank = _world_and_rank()
    process = Process(pick_device(device), world, rank)
    if world > 1:
        if backend == "nccl" and process.device.type == "mps":
            raise UserError("several processes cannot train on mps: use --device cpu")
        backend = backend if process.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (RuntimeError, ValueError) as error:  # such as a port that is in use
            raise UserError(f"the processes cannot connect: {one_line(error)}") from None
    try:
        yield process
    finally:
        if world > 1:
            dist.destroy_process_group()


def _world_and_rank() -> tuple[int, int]:
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name) for name in names}
    if values["WORLD_SIZE"] in (None, "1"):
        return 1, 0
    try:
        world, rank = int(values["WORLD_SIZE"]), int(values["RANK"])
        if not 0 <= rank < world or not 0 < int(values["MASTER_PORT"]) < 2**16:
            raise ValueError
        if values["MASTER_ADDR"] is None:
            raise ValueError
    except (TypeError, ValueError):
        found = " ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"the environment has {found}: start several processes with torchrun, or unset these"
        ) from None
    return world, rank
