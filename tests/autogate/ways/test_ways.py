"""Every way to choose which channels die, through everything that all of them promise."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autogate
from rewriters import relative_error, run_eval
from tests.autogate.gated_nets import ConvNet
from tests.autogate.ways.registry import NETS, STEPS, WAYS, Way, batches
from tests.processes import free_port, run_in_processes

EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(7))

slow = pytest.mark.slow
all_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
trained_ways = pytest.mark.parametrize(
    "way", [way for way in WAYS.values() if way.trains], ids=[name for name, way in WAYS.items() if way.trains]
)


def prepared(way: Way, net: str = "plain", flops: float = 0.5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return autogate.prepare(NETS[net](), EXAMPLE, flops=flops, steps=STEPS, method=way.method, **options)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(model: nn.Module, steps: int, first: int = 0, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or sgd(model)
    for images, labels in batches(steps, first):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def outputs(model: nn.Module) -> list[Tensor]:
    """On a batch of another length than any before."""
    return run_eval(model, (batches(1, first=1000, size=5)[0][0],))


def assert_slims_exactly(model: nn.Module) -> nn.Module:
    wanted = outputs(model)
    slim = autogate.finalize(model)
    assert relative_error(outputs(slim), wanted) <= 1e-5
    return slim


def assert_on_budget(model: nn.Module) -> None:
    """Within a point; in a network as small as these a class may be more than that."""
    bank = autogate.gates(model)
    flops, live = bank.targets.targets[0].resource, bank.live.cpu()
    dearest = float(flops.drop(live).max()) / flops.whole
    assert abs(bank.shares()["FLOPs"] - 0.5) <= max(0.01, dearest)


def widths(slim: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in slim.named_parameters()}


@all_ways
@pytest.mark.parametrize("net", [net if net == "residual" else pytest.param(net, marks=slow) for net in NETS])
def test_the_budget_is_met_and_the_slim_model_is_exact(way, net):
    if way.nets is not None and net not in way.nets:
        pytest.skip("the channels of this network have no batch norms")
    model = prepared(way, net)
    way.close(train, model)
    assert_on_budget(model)
    dense = sum(parameter.numel() for parameter in NETS[net]().parameters())
    assert sum(parameter.numel() for parameter in assert_slims_exactly(model).parameters()) < dense


@slow
@all_ways
def test_widths_are_multiples(way):
    model = prepared(way, flops=0.6, round_to=4)
    way.close(train, model)
    slim = assert_slims_exactly(model)
    found = (slim.conv1.out_channels, slim.conv2.out_channels, slim.conv3.out_channels)
    assert all(width % 4 == 0 for width in found) and found != (16, 24, 24)


@slow
@all_ways
def test_limits_are_kept(way):
    model = prepared(way, limits={"conv1": 0.9, "conv2": (0.1, 0.5)})
    way.close(train, model)
    slim = assert_slims_exactly(model)
    assert slim.conv1.out_channels >= 15 and 3 <= slim.conv2.out_channels <= 12


@slow
@all_ways
def test_shortcuts_get_widths_of_their_own(way):
    model = prepared(way, "residual", shortcuts="conv")
    way.close(train, model)
    assert_on_budget(model)
    slim = assert_slims_exactly(model)
    assert slim.conv2.out_channels < 24 or slim.conv3.out_channels < 24


@slow
@all_ways
def test_a_deep_copy_goes_the_same_way(way):
    model = prepared(way)
    other = copy.deepcopy(model)
    for one in (model, other):
        way.close(train, one)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert widths(autogate.finalize(other)) == widths(autogate.finalize(model))


@slow
@all_ways
def test_a_slim_model_is_saved_and_loaded(way, tmp_path):
    model = prepared(way)
    way.close(train, model)
    slim = assert_slims_exactly(model).eval()
    autogate.save(slim, tmp_path / "slim.safetensors")
    loaded = autogate.load(tmp_path / "slim.safetensors", model=ConvNet())
    assert all(map(torch.equal, outputs(loaded), outputs(slim)))


@trained_ways
def test_a_resumed_run_is_the_same_run(way):
    whole = prepared(way)
    train(whole, STEPS)
    stopped = prepared(way)
    optimizer = sgd(stopped)
    train(stopped, 17, optimizer=optimizer)
    state = copy.deepcopy((stopped.state_dict(), optimizer.state_dict()))
    resumed = prepared(way)
    optimizer = sgd(resumed)
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, STEPS - 17, first=17, optimizer=optimizer)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@slow
@trained_ways
def test_without_hooks_it_is_the_same_run(way):
    followed, called = prepared(way), prepared(way, hooks=False)
    train(followed, STEPS)
    optimizer = sgd(called)
    for step in range(STEPS):
        train(called, 1, first=step, optimizer=optimizer)
        autogate.step(called, lr=0.05)
    for name, value in followed.state_dict().items():
        torch.testing.assert_close(called.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def _in_two_processes(rank: int, name: str, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = prepared(WAYS[name])
    wrapped = nn.parallel.DistributedDataParallel(model)

    def train_its_part(model: nn.Module, steps: int) -> None:
        train(wrapped, steps, first=10_000 * (1 + rank))

    WAYS[name].close(train_its_part, model)
    autogate.finalize(model)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@slow
@pytest.mark.parametrize("name", WAYS)
def test_two_processes_end_with_the_same_network(name, tmp_path):
    run_in_processes(_in_two_processes, 2, name, free_port(), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, value in first.items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(second[key], value), key
