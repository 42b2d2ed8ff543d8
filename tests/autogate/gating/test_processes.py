"""Processes of DistributedDataParallel whose gates differ are told of; those that may differ are left alone."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join

import autogate
from autogate.gating import processes
from autogate.gating.processes import Note, differing
from tests.processes import free_port, run_in_processes

NOTE_STEPS, FAULT_AT, BEYOND = 10, 7, 21
"""Steps between notes in these runs, the step of the fault, and a run of two notes."""


def prepared(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    return autogate.prepare(nn.Sequential(*layers), torch.ones(2, 3, 8, 8), flops=0.5, steps=400)


def train(model: nn.Module, steps: int, rank: int, before_step=lambda step: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(steps):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), (images.mean((1, 2, 3)) > 0).long()).backward()
        before_step(step)
        optimizer.step()


def wrapped(model: nn.Module, **options) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def _fault(rank: int, change, **options) -> None:
    """A run in which the second process alone changes something; both raise, and name it."""
    model = prepared()

    def before_step(step: int) -> None:
        if rank == 1 and step == FAULT_AT:
            with torch.no_grad():
                change(model)

    with pytest.raises(
        autogate.AutogateError, match=f"at step {NOTE_STEPS} the gates on rank 1 were not those on rank 0"
    ):
        train(wrapped(model, **options), BEYOND, rank, before_step)


def _close_some(model: nn.Module) -> None:
    autogate.gates(model).alpha[:4] = 0


def _open_less(model: nn.Module) -> None:
    autogate.gates(model).alpha[:4] *= 0.5


def _runs(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes.NOTE_STEPS = NOTE_STEPS
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    _fault(rank, _close_some, broadcast_buffers=False)
    _fault(rank, _open_less, broadcast_buffers=False)
    _fault(rank, _close_some)  # the next forward gives it the first process's buffers, and not the kernels
    alone = prepared(seed=rank)
    train(alone, BEYOND * (1 + rank), rank)  # no DistributedDataParallel: each is a run of its own
    uneven = wrapped(prepared())
    start = copy.deepcopy(uneven.module.state_dict())
    with Join([uneven]):  # several notes of the second process while the first waits
        train(uneven, 2 + rank * 2 * BEYOND, rank)
    train(uneven, BEYOND, rank)
    assert autogate.gates(uneven.module).progress().step == 2 + 3 * BEYOND
    uneven.module.load_state_dict(start)  # as it was, on every process
    train(uneven, BEYOND, rank)
    assert autogate.gates(uneven.module).progress().step == BEYOND
    assert len(autogate.gates(uneven.module)._watch.processes._own) == 2  # it was compared, all along
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_process_with_other_gates_is_named_and_no_other_run_is_stopped():
    run_in_processes(_runs, 2, free_port())


def test_the_ranks_that_differ_are_those_not_in_the_largest_group():
    same = Note(7, 100.0, 50.0)
    rounded = Note(7, 100.0005, 50.01)
    assert differing({0: same, 1: rounded, 2: same}, classes=100) == []
    assert differing({0: same._replace(dead=8), 1: same, 2: rounded}, classes=100) == [0]
    assert differing({0: same, 1: same._replace(alpha=99.5), 2: same, 3: same._replace(kernels=49.0)}, 100) == [1, 3]
    assert differing({1: same._replace(dead=8), 0: same}, classes=100) == [1]


def test_kernels_that_are_nan_are_not_compared():
    nan = Note(7, 100.0, float("nan"))
    assert differing({0: nan, 1: nan}, classes=100) == []
    assert differing({}, classes=100) == []
