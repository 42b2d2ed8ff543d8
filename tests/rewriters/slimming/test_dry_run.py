"""A dry run slims the model once before training: only calls that refuse it keep their channels."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.slimming.dry_run import dry_run
from tests.rewriters.exactness import TOLERANCE, slim
from tests.rewriters.helpers import Net, conv, image, reasons


class Exacting(nn.Module):
    """Takes no other width than it was built for, and torch.fx can't follow how it looks it up."""

    def forward(self, x):
        return x * {6: 2.0}[x.shape[1]]


class Asserting(nn.Module):
    """Makes sure of its width, as diffusers' up- and downsampling does."""

    def __init__(self):
        super().__init__()
        self.channels, self.layer = 6, conv(6, 6, 3)

    def forward(self, x):
        assert x.shape[1] == self.channels
        if x.shape[1] != self.channels:
            raise ValueError("another width")
        return self.layer(x)


def dry_run_of(model: nn.Module):
    x = (image(),)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    channel_map = dry_run(model.eval(), analyse(model, x), x).channel_map
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    return channel_map


def test_a_module_that_refuses_keeps_its_channels():
    model = Net(
        lambda m, x: m.c(m.b(m.exacting(m.a(x)))), a=conv(3, 6), exacting=Exacting(), b=conv(6, 5), c=conv(5, 2)
    )
    found = dry_run_of(model)
    assert any("refuses fewer channels" in reason for reason in reasons(found, "a.weight", 0))
    assert found.size == 5


def test_what_a_module_asserts_of_its_width_is_written_anew():
    model = nn.Sequential(conv(3, 6), Asserting(), nn.ReLU(), conv(6, 5), conv(5, 2)).double()
    x = (image().double(),)
    analysis = dry_run(model.eval(), analyse(model, x), x)
    assert analysis.channel_map.size == 6 + 6 + 5 and not reasons(analysis.channel_map, "0.weight", 0)
    for seed in range(3):
        slimmed = slim(copy.deepcopy(model), x, seed=seed, analysis=analysis)
        assert slimmed.error <= TOLERANCE and "1" in slimmed.plan.forwards


def test_a_tensor_made_on_a_device_by_name_refuses_nothing():
    """It can't be added to one without data, on which the slim model is tried first."""

    def forward(m, x):
        return m.b(m.a(x) + torch.ones(4, device="cpu"))

    assert dry_run_of(Net(forward, a=conv(3, 6), b=conv(6, 2))).size == 6
