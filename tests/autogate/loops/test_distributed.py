"""DistributedDataParallel: every process has the same gates."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join

import autogate
from tests.autogate.loops.training import assert_exact, loss_of, output
from tests.processes import free_port, run_in_processes


class Plain(nn.Module):
    """A residual net without batch statistics, so that a batch may be divided among processes."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.unused, self.head = nn.Conv2d(3, 4, 1), nn.Linear(16, 4)

    def forward(self, images, also: bool = False):
        x = self.stem(images).relu()
        x = x + self.conv2(self.conv1(x).relu())
        out = self.head(x.mean((2, 3)))
        return out + self.unused(images).mean((2, 3)) if also else out


STEPS, GLOBAL_BATCH = 40, 8


def _train_share(rank: int, world: int, port: int, folder: str) -> None:
    """One process of a distributed run: its part of every global batch, the last of them of uneven sizes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = autogate.prepare(Plain(), torch.randn(2, 3, 8, 8), flops=0.5, steps=STEPS)
    wrapped = _wrapped(model, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    _train_steps(wrapped, optimizer, range(STEPS), slice(rank, None, world), world)
    torch.save(model.state_dict(), f"{folder}/{world}_{rank}.pt")
    gated = output(model, torch.ones(2, 3, 8, 8))
    slim = autogate.finalize(wrapped, optimizer=optimizer)
    torch.testing.assert_close(output(slim, torch.ones(2, 3, 8, 8)), gated, rtol=1e-5, atol=1e-6)
    _train_steps(_wrapped(slim, world), optimizer, range(STEPS, STEPS + 10), slice(rank, None, world), world)
    torch.save(slim.state_dict(), f"{folder}/slim_{world}_{rank}.pt")
    if world == 2:
        _train_until_the_last_runs_out(rank, folder)
    if world > 1:
        torch.distributed.destroy_process_group()


def _wrapped(model: nn.Module, world: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model


def _train_steps(wrapped: nn.Module, optimizer: torch.optim.Optimizer, steps: range, mine: slice, world: int) -> None:
    for step in steps:
        uneven = step % 10 == 9
        images = torch.randn(GLOBAL_BATCH + uneven, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        labels = (images.mean((1, 2, 3)) > 0).long()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(images[mine]), labels[mine], reduction="sum")
        (loss * world / len(images)).backward()
        optimizer.step()


def _train_until_the_last_runs_out(rank: int, folder: str) -> None:
    """Two epochs in which the second process has more batches than the first, within `Join`."""
    torch.manual_seed(0)
    model = autogate.prepare(Plain(), torch.randn(2, 3, 8, 8), flops=0.5, steps=STEPS)
    wrapped = _wrapped(model, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(2):
        with Join([wrapped]):
            for step in range(STEPS // 2 - 3 * (1 - rank)):
                optimizer.zero_grad()
                loss = loss_of(wrapped, 1000 * epoch + 10 * step + rank, size=4)
                loss.backward()
                optimizer.step()
    assert autogate.gates(model).progress().step == STEPS and autogate.gates(model).progress().settled
    torch.save(model.state_dict(), f"{folder}/join_{rank}.pt")
    assert_exact(model, torch.ones(2, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_process_of_a_distributed_run_has_the_same_gates(world, tmp_path):
    _train_share(0, 1, 0, str(tmp_path))
    run_in_processes(_train_share, world, world, free_port(), str(tmp_path))
    alone = torch.load(tmp_path / "1_0.pt")
    states = [torch.load(tmp_path / f"{world}_{rank}.pt") for rank in range(world)]
    assert alone["autogate.dead"].any()
    joined = [torch.load(path) for path in sorted(tmp_path.glob("join_*.pt"))]
    assert len(joined) == (2 if world == 2 else 0)
    slim = [torch.load(tmp_path / f"slim_{world}_{rank}.pt") for rank in range(world)]
    for first, *others in filter(None, (states, joined, slim)):
        for state in others:
            for key, value in state.items():
                assert torch.equal(value, first[key]), f"{key} differs between processes"
    assert torch.equal(states[0]["autogate.dead"] > 0, alone["autogate.dead"] > 0)
    torch.testing.assert_close(states[0]["autogate.alpha"], alone["autogate.alpha"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slim[0], torch.load(tmp_path / "slim_1_0.pt"), rtol=1e-3, atol=1e-4)
