"""Forwards that hold sizes, traced and rewritten, for other tests."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.forwards.rewritten_forward import RewrittenForward
from rewriters.forwards.tracing import trace
from rewriters.labelling.propagate import Labelling
from rewriters.recording.capture import capture
from tests.rewriters.exactness import random_live, slim, zero_kernels
from tests.rewriters.helpers import conv


def traced(model: nn.Module, *args, **kwargs):
    """The traced graph of a model's own forward."""
    analysis = analyse(model, args, kwargs)
    captured, labelling = analysis.captures[0], analysis.labelling
    return trace(model, captured.root, captured, labelling, labelling.by_tensor())[0]


def traced_in(model: nn.Module, training: bool, args, kwargs):
    """The traced graph of a model's own forward in a mode."""
    captured, labelling = capture(model.train(training), args, kwargs), Labelling()
    labelling.run(captured)
    return trace(model, captured.root, captured, labelling, labelling.by_tensor())[0]


def rewritten(model: nn.Module, *args, **kwargs) -> nn.Module:
    """The model running its own forward as it was traced, nothing having been cut."""
    graph = traced(model, *args, **kwargs)
    model.forward = RewrittenForward(model, {False: (graph,), True: (graph,)})
    return model


class Split(nn.Module):
    """Two convolutions that share the halves of a third's channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8, 3), conv(4, 4, 3), conv(8, 2)

    def forward(self, x, scale=None, *, power: float = 1.0):
        first, second = self.a(x).chunk(2, 1)
        if scale is not None:
            first = first * scale
        if x.shape[-1] > 8:
            first = F.relu(first)
        return self.c(torch.cat([second, self.b(first)], 1)) ** power


def slim_and_gated(build, *args, **kwargs):
    torch.manual_seed(0)
    slim_model = build().double().eval()
    gated = copy.deepcopy(slim_model)
    slimmed = slim(slim_model, args, kwargs, share=0.6, seed=3)
    channel_map = slimmed.analysis.channel_map
    zero_kernels(gated, channel_map, random_live(channel_map.size, 0.6, 3))
    assert slimmed.plan.forwards
    return slim_model, gated


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = conv(3, 8), conv(8, 2)

    def forward(self, x):
        first, second = self.a(x).split([3, 5], 1)
        if self.training:
            returned = self.c(torch.cat([second, first], 1).roll(3, 1))
            return returned, returned.mean((2, 3))
        return self.c(torch.cat([first, second], 1))
