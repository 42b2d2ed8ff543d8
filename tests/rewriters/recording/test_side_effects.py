"""Tensors that a forward keeps from call to call hide no dependence, and are dropped after recording."""

import copy
import functools
import random

import numpy as np
import torch
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.labelling.channel_map import Side
from rewriters.outputs import run_eval
from rewriters.slimming.dry_run import dry_run
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import conv, image


class Looked(nn.Module):
    """Adds a bias that is looked up in a table, in eval mode only once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 2)
        self.table, self.cache = nn.Parameter(torch.randn(3, 4)), {}

    def bias(self):
        if self.training:
            return self.table[torch.tensor([1])].view(1, -1, 1, 1)
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[torch.tensor([1])].view(1, -1, 1, 1)
        return self.cache["bias"]

    def forward(self, x):
        return self.b(self.a(x) + self.bias())


def test_a_cache_hides_nothing_from_the_analysis_and_stays_on_its_module():
    model, x = Looked().eval(), image()
    run_eval(model, (x,))
    cache, kept = model.cache, model.cache["bias"]
    assert Side("table", 1) in analyse(model, (x,)).channel_map.classes
    assert model.cache is cache
    assert model.cache["bias"] is kept


def test_a_slim_model_has_no_cache_of_the_sizes_that_were():
    model, x = Looked().double().eval(), image().double()
    run_eval(model, (x,))
    slimmed = assert_exact(model, (x,))
    assert slimmed.got[0].shape == (2, 2, 4, 4)


def remembering(function):
    kept = functools.lru_cache(function)
    return lambda *args: kept(*args)


class Remembering(nn.Module):
    """Keeps what it looked up in an lru_cache, and registers a hook when it first runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = conv(3, 4), conv(4, 2), torch.randn(3, 4)
        self.seen, self.hooked = [], False
        self.look_up = functools.lru_cache(lambda size: torch.arange(size).view(1, 1, 1, -1) * 1.0)

    def forward(self, x):
        if not self.hooked:
            self.a.register_forward_hook(lambda module, args, output: self.seen.append(output.shape))
            self.hooked = True
        return self.b(self.a(x) * self.look_up(x.shape[-1]) + self.count(x.shape[-1]))

    @staticmethod
    @remembering
    def count(size):
        return torch.arange(size).view(1, 1, 1, -1) * 1.0


def test_what_a_forward_leaves_elsewhere_is_gone_after_the_analysis():
    model, x = Remembering().eval(), image()
    analyse(model, (x,))
    assert not model.a._forward_hooks and not model.hooked
    wanted = run_eval(model, (x,))
    assert model.look_up.cache_info().currsize == 1
    analyse(model, (image(size=8),))
    analyse(model, (x,))
    assert len(model.a._forward_hooks) == 1
    assert type(run_eval(model, (x,))[0]) is type(wanted[0]) is torch.Tensor
    assert torch.equal(run_eval(model, (x,))[0], wanted[0])


class Note:
    """An object that is no module."""

    last = None


class NotingElsewhere(nn.Module):
    """Keeps what it saw on a child that it doesn't call, on an object of its own and on one of the child's."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.pad = conv(3, 6), conv(6, 2), nn.Identity()
        self.note, self.pad.note, self.pad.seen = Note(), Note(), []

    def forward(self, x):
        first, second = self.a(x).split([2, 4], 1)
        self.pad.first = self.note.last = self.pad.note.last = first
        self.pad.seen.append(first)
        return self.b(torch.cat([second, self.pad.first], 1))


def test_what_a_forward_leaves_on_children_and_objects_is_gone_after_the_analysis():
    model = NotingElsewhere().eval()
    slimmed = assert_exact(copy.deepcopy(model).double(), (image().double(),))
    assert slimmed.analysis.traced
    analyse(model, (image(),))
    assert not vars(model.note) and not vars(model.pad.note) and not model.pad.seen
    assert "first" not in vars(model.pad)


class Fitting(nn.Module):
    """Makes its table of places anew, a buffer, where the image has another size than the last."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), conv(6, 2)
        self.register_buffer("places", torch.zeros(1, 1), persistent=False)

    def forward(self, x):
        if self.places.shape[-1] != x.shape[-1]:
            self.places = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)[None]
        first, second = self.a(x).split([2, 4], 1)
        return self.b(torch.cat([second, first + self.places], 1))


def test_a_buffer_that_the_forward_makes_anew_is_that_of_the_example_inputs():
    x = image().double()
    for first in (x, image(size=6).double()):
        model = Fitting().double().eval()
        run_eval(model, (first,))
        analysis = analyse(model, (x,))
        assert type(model.places) is torch.Tensor
        assert model.places.shape == (1, 4)
        assert analysis.channel_map.size == 6
        slimmed = assert_exact(model, (x,))
        assert "" in slimmed.plan.forwards


class Drawing(nn.Module):
    """Draws from Python and numpy, before a call that holds a size, which tracing is tried for, or without one."""

    def __init__(self, channels: int = 0):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        random.random(), np.random.rand()
        return x.view(x.shape[0], self.channels, *x.shape[2:]) if self.channels else x


def test_random_numbers_come_as_they_would_have_come():
    model, x = nn.Sequential(Drawing(), conv(3, 8), Drawing(8), conv(8, 4), nn.Dropout(), conv(4, 2)), image()
    drawn = []
    for looks in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if looks:
            assert dry_run(model, analyse(model, (x,)), (x,)).channel_map.size == 12  # its own code stays
        drawn.append((random.random(), np.random.rand(), torch.rand(())))
    assert drawn[0] == drawn[1]
