"""The processes of a run, as torchrun starts them. A single process is a world of size 1."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autogate.switching import subnets_of
from rewriters import AutogateError


@dataclass(frozen=True)
class World:
    """The processes that train one model, seen from this one.

    Attributes:
        rank: number of this process.
        size: number of processes.
        device: device that this process trains on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All processes have to call this."""
        return bool(self.total(torch.tensor(int(flag))))  # on the CPU, so as not to wait for a GPU

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model so that its gradients are averaged over all processes."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # A subnet uses no norm of the others.
        unused = subnets_of(model) is not None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, find_unused_parameters=unused)


@contextlib.contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Join the world that torchrun's environment variables describe.

    Args:
        device: "cpu", "cuda", "cuda:1"; if None, a GPU if there is one.

    Raises:
        AutogateError: there is no such device.
    """
    size, rank, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    at = _device(device, local if size > 1 else None)
    if size == 1:
        yield World(device=at)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if at.type == "cuda" else "gloo")
    try:
        yield World(rank, size, at)
    finally:
        dist.destroy_process_group()


_ENVIRONMENT = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))


def _device(name: str | None, local: int | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and local is not None:
            device = torch.device("cuda", local)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AutogateError(f"{name} can't be used: {str(error).splitlines()[0]}", where="device") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
