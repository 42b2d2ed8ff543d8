"""A layer that loses all channels keeps one where its branch can't be removed. That channel never learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import autogate
from autogate import subnets
from autogate.slim.history import history_of

EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
}


class Bordered(nn.Module):
    """The branch behind a dead layer has another value at the border, so no constant can replace it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.first, self.second = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.third = nn.Conv2d(5, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + self.third(self.second(self.first(y).sigmoid()).cos()))


class Grown(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(torch.cat(features, 1)).sigmoid()


class Dense(nn.Module):
    """A dead layer is an operand of concatenations in other modules, whose kernels have a dead column among others."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)
        self.layers = nn.ModuleList([Grown(8), Grown(12)])

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(torch.cat(features, 1))


class Concatenation(nn.Module):
    def forward(self, *features: Tensor) -> Tensor:
        return torch.cat(features, 1)


class Functional(nn.Module):
    """As `Dense`, the kernel being read by a function too, by its second name."""

    def __init__(self):
        super().__init__()
        self.both = Concatenation()
        self.stem, self.first = nn.Conv2d(3, 8, 1), Grown(8)
        self.other, self.head = nn.Conv2d(12, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
        self.weight = self.other.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        both = self.both(y, self.first([y]))
        return self.head((self.other(both) + torch.conv2d(both, self.weight)).relu())


KILLED = {Bordered: "first.weight[0]", Dense: "layers.0.conv.weight[0]", Functional: "first.conv.weight[0]"}


def closed(kind: Callable[[], nn.Module]) -> nn.Module:
    """A gated model whose gates stand still, with one layer that has lost all of its channels."""
    torch.manual_seed(0)
    model = autogate.prepare(kind().double(), EXAMPLE, flops=1.0, steps=1)
    bank = autogate.gates(model)
    (classes,) = (classes for side, classes in bank.channel_map.classes.items() if str(side) == KILLED[kind])
    with torch.no_grad():
        bank.alpha[classes] = 0
    bank.fold()
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, 4, dtype=torch.float64).view(4, 1, 1)).square().mean().backward()
    optimizer.step()
    return output.detach()


@pytest.mark.filterwarnings("ignore:the run has")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KILLED, ids=lambda kind: kind.__name__)
def test_gated_and_slim_training_give_the_same_outputs_step_by_step(kind, name):
    gated = closed(kind)
    optimizer = OPTIMIZERS[name](gated.parameters())
    for seed in range(2):  # so that the optimizer has a state, of the dead columns too
        step(gated, optimizer, seed)
    assert autogate.gates(gated).stands_still
    slim = copy.deepcopy(gated)
    own = OPTIMIZERS[name](slim.parameters())
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    autogate.finalize(slim, optimizer=own, warn=False)
    assert history_of(slim).slimmings[0].dead and not history_of(slim).slimmings[0].removed
    copied = copy.deepcopy(slim)
    third = OPTIMIZERS[name](copied.parameters())
    third.load_state_dict(copy.deepcopy(own.state_dict()))
    for seed in range(2, 6):
        wanted = step(gated, optimizer, seed)
        for model, its in ((slim, own), (copied, third)):
            torch.testing.assert_close(step(model, its, seed), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KILLED, ids=lambda kind: kind.__name__)
def test_a_slim_file_keeps_them_closed(kind, tmp_path):
    slim = autogate.finalize(closed(kind), warn=False)
    autogate.save(slim, tmp_path / "slim.safetensors")
    loaded = autogate.load(tmp_path / "slim.safetensors", kind().double(), example_inputs=EXAMPLE)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (slim, loaded)]
    for seed in range(3):
        outputs = [step(model, one, seed) for model, one in zip((slim, loaded), optimizers, strict=True)]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", KILLED, ids=lambda kind: kind.__name__)
def test_they_go_when_the_slim_model_is_slimmed_again(kind):
    """The mask of a kernel with dead columns is cut like the kernel."""
    slim = autogate.prepare(autogate.finalize(closed(kind), warn=False), EXAMPLE, flops=1.0)
    bank = autogate.gates(slim)
    with torch.no_grad():
        bank.alpha[::2] = 0
    bank.fold()
    gated = copy.deepcopy(slim)
    torch.testing.assert_close(autogate.finalize(slim, warn=False)(EXAMPLE), gated(EXAMPLE))


@pytest.mark.parametrize("kind", KILLED, ids=lambda kind: kind.__name__)
def test_a_subnet_trains_as_the_slim_model_that_is_taken_out_of_it(kind):
    found = subnets.of(closed(kind), names=["narrow"])
    torch.manual_seed(0)
    switchable = subnets.fuse(kind().double(), found)
    subnets.switch(switchable, "narrow")
    slim = subnets.extract(switchable, "narrow")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (switchable, slim)]
    for seed in range(4):
        outputs = [step(model, one, seed) for model, one in zip((switchable, slim), optimizers, strict=True)]
        torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-13)
