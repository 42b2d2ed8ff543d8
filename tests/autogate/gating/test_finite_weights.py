"""Weights that are not finite are told of at the step after which they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import autogate
from autogate.gating.finite_weights import UNREAD_STEPS
from tests.autogate.gated_nets import backward, gated_net, train

METHODS = {"GDP": autogate.GDP(), "group Lasso": autogate.ClippedLasso()}


def told(run: Callable[[], object]) -> list[str]:
    """What a run is warned of that concerns weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if "not finite" in str(one.message)]


def stepped(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int, scale: float = 1.0) -> Callable[[], object]:
    def run() -> None:
        backward(net, seed, scale=scale)
        optimizer.step()

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_nan_is_told_of_at_its_own_step_and_once(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    images = torch.randn(4, 3, 8, 8)
    autogate.prepare(model, images, flops=0.5, steps=100, method=METHODS[method])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step(factor: float) -> list[str]:
        optimizer.zero_grad()
        (model(images).square().mean() * factor).backward()
        return told(optimizer.step)

    assert step(1.0) == []
    (message,) = step(float("nan"))
    assert message.startswith("0.weight, 0.bias, 2.weight and others: the weights are not finite")
    assert step(1.0) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_layer_is_named(value):
    net, _ = gated_net(steps=100)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    with torch.no_grad():
        net.conv2.weight[3, 2] = value
    backward(net)
    for weight in net.parameters():
        weight.grad.zero_()  # the optimizer spoils no other layer
    (message,) = told(optimizer.step)
    assert message.startswith("conv2.weight: the weights")


def test_gradients_alone_that_are_not_finite_are_not_told_of():
    """Some optimizers leave such a step out by themselves."""

    class Careful(torch.optim.SGD):
        def step(self, closure=None):
            if all(weight.grad.isfinite().all() for group in self.param_groups for weight in group["params"]):
                super().step(closure)

    net, bank = gated_net(steps=100)
    optimizer = Careful(net.parameters(), 0.1)
    assert told(stepped(net, optimizer, 0, scale=float("inf"))) == [] and bank.step_count == 0
    assert told(stepped(net, optimizer, 1)) == [] and bank.step_count == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_told_of(fused):
    net, bank = gated_net(steps=100)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))

    def run() -> None:
        backward(net, scale=float("inf"))
        scaler.step(optimizer)
        scaler.update()

    assert told(run) == [] and bank.step_count == 0 and net.conv2.weight.isfinite().all()


def test_once_gates_stand_still_weights_are_looked_at_every_so_many_steps():
    net, bank = gated_net(1.0, steps=2)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    train(net, optimizer, 2)
    assert bank.stands_still
    with torch.no_grad():
        net.fc.bias[0] = float("nan")
    backward(net)
    for weight in net.parameters():
        weight.grad.zero_()
    found = told(lambda: [optimizer.step() for _ in range(2 * UNREAD_STEPS)])
    assert [message.split(":")[0] for message in found] == ["fc.bias"]


def test_after_a_checkpoint_is_loaded_it_is_told_of_again():
    net, _ = gated_net(steps=100)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    good = copy.deepcopy(net.state_dict())
    assert len(told(stepped(net, optimizer, 0, scale=float("nan")))) == 1
    net.load_state_dict(good)
    assert told(stepped(net, optimizer, 0)) == []
    assert len(told(stepped(net, optimizer, 1, scale=float("nan")))) == 1


def test_the_warning_points_to_the_step():
    net, _ = gated_net(steps=100)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    backward(net, scale=float("nan"))
    with pytest.warns(UserWarning, match="not finite") as caught:
        optimizer.step()
    assert [one.filename for one in caught if "not finite" in str(one.message)] == [__file__]
