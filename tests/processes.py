"""Groups of processes for tests of distributed training."""

import contextlib
import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch


def run_in_processes(function: Callable[..., None], count: int, *args: Any) -> None:
    """Call `function(rank, *args)` in so many processes; what one of them raises is raised here.

    They are forked from a server that has imported everything, which takes seconds, once for all tests of a worker.
    """
    multiprocessing.set_forkserver_preload(["timm", "autogate"])
    torch.multiprocessing.start_processes(function, args, nprocs=count, start_method="forkserver")


def free_port() -> int:
    """A port on this machine for the processes to meet at."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
