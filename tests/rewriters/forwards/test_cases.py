"""Modules that are called in several ways: a trace for each, chosen by the arguments."""

import copy
import pickle

import pytest
import torch
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.forwards.guards import ShapeGuardError
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, assert_exact, slim
from tests.rewriters.helpers import Net, conv, image


class Cell(nn.Module):
    """A convolutional recurrent cell whose state is None at first."""

    def __init__(self):
        super().__init__()
        self.input, self.state, self.mix = conv(3, 16), conv(8, 16), conv(8, 8)

    def forward(self, x, state=None):
        gates = self.input(x)
        if state is not None:
            gates = gates + self.state(state)
        keep, new = gates.chunk(2, 1)
        new = torch.tanh(new) * self.mix(keep)
        return new if state is None else new + state


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = Cell(), conv(8, 2)

    def forward(self, x):
        state = self.cell(x)
        for _ in range(2):
            state = self.cell(x, state)
        return self.head(state)


class Same(nn.Module):
    """A module that asks whether two arguments are one tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, x, y):
        k, v = self.kv(y).chunk(2, -1)
        v = self.mix(v)
        return self.out(self.q(x) * k if x is y else self.q(x) + k * v)


def reused(block):
    def forward(m, x):
        x = m.stem(x.flatten(2).transpose(1, 2))
        return m.head(m.block(x, m.block(x, x)))

    return Net(forward, stem=nn.Linear(3, 8), block=block, head=nn.Linear(8, 2))


@pytest.mark.parametrize(("build", "seed"), [(Recurrent, 2), (lambda: reused(Same()), 0)])
def test_a_module_that_is_called_in_two_ways_is_slim(build, seed):
    torch.manual_seed(0)
    model = build().double()
    x = image().double()
    assert analyse(model, (x,)).channel_map.size >= 8
    assert_exact(model, (x,))
    slimmed = slim(model.eval(), (x,), share=0.6, seed=seed)
    (forward,) = [module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__]
    assert len(forward.functions[False]) == 2
    other = image(size=6, batch=3).double()
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if isinstance(model, Recurrent) else model
    got = [run_eval(one, (other,)) for one in (model, *others)]
    slimmed.undo_log.undo()
    assert all(relative_error(one, run_eval(model, (other,))) <= TOLERANCE for one in got)


def test_a_call_of_another_kind_is_refused_with_all_reasons():
    model = Recurrent().double().eval()
    slim(model, (image().double(),), share=0.6, seed=2)
    with pytest.raises(ShapeGuardError, match=r"cell: the call is none of .*'tensor', None.*; .*'tensor', 'tensor'"):
        model.cell(image().double(), [1])


def test_statistics_of_a_module_that_is_called_in_two_ways():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x, other=None):
            x = x if other is None else x * other.tanh()
            return self.weight * (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def forward(m, x):
        first = m.norm(m.a(x))
        return m.head(m.norm(m.b(x), first))

    model = Net(forward, a=conv(3, 8), b=conv(3, 8), norm=Norm(), head=conv(8, 2)).double()
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.sites and slimmed.analysis.channel_map.size == 8


def test_ways_that_the_arguments_do_not_tell_apart_keep_their_channels():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(8, 16), conv(8, 8)

        def forward(self, x):
            first, second = self.a(x).chunk(2, 1)
            y = first * self.b(second)
            return y * 2 if y.mean((0, 1, 2)).shape[0] > 3 else y

    model = Net(lambda m, x: m.head(m.block(m.block(x)[..., :2])), block=Block(), head=conv(8, 2))
    found = analyse(model, (image(channels=8),)).channel_map
    assert any("its arguments don't tell apart" in pin.reason for pin in found.pins)


def by_unbind(clip):
    return clip.unbind(1)


def by_split(clip):
    return [part.flatten(1, 2) for part in clip.transpose(1, 2).split(1, 2)]


@pytest.mark.parametrize("frames_of", [by_unbind, by_split])
def test_numbers_of_frames_are_told_apart_before_anything_is_computed(frames_of):
    def forward(m, clip):
        state = 0
        for frame in frames_of(clip):
            left, right = m.a(frame).chunk(2, 1)
            state = 0.5 * state + torch.tanh(left) * m.b(right)
        return m.c(state)

    model, clips = Net(forward, a=conv(3, 16), b=conv(8, 8), c=conv(8, 2)), torch.randn(2, 5, 3, 4, 4).double()
    model = model.double().eval()
    calls = [(clips[:3, :frames],) for frames in (2, 4, 1)]
    analysis = analyse(model, calls[0], others=[(call, {}) for call in calls[1:]])
    slimmed = slim(model, calls[0], share=0.4, analysis=analysis)
    assert model.a.out_channels < 16
    got = [run_eval(model, call) for call in calls]
    with pytest.raises(ShapeGuardError, match="the call is none of those that it was traced for"):
        model(clips)
    slimmed.undo_log.undo()
    assert all(relative_error(one, run_eval(model, call)) <= TOLERANCE for one, call in zip(got, calls, strict=True))


def test_ways_are_told_apart_by_the_size_after_padding():
    class Window(nn.Module):
        """Windows of four, shifted by two where the padded input has more than one of them (torchvision's Swin)."""

        def __init__(self):
            super().__init__()
            self.a, self.b = conv(8, 16), conv(8, 8)

        def forward(self, x):
            height = x.shape[2]
            x = nn.functional.pad(x, (0, 0, 0, -height % 4))
            shift = 2 if x.shape[2] > 4 else 0
            first, second = self.a(x.roll(shift, 2)).chunk(2, 1)
            return (first * self.b(second)).roll(-shift, 2)[:, :, :height]

    model = Net(lambda m, x: m.head(m.block(m.stem(x))), stem=conv(3, 8), block=Window(), head=conv(8, 2))
    model, images = model.double().eval(), torch.randn(3, 3, 12, 6).double()
    calls = [(images[:, :, :height],) for height in (4, 5, 3, 12)]
    analysis = analyse(model, calls[0], others=[(calls[1], {})])
    assert not any("tell apart" in pin.reason for pin in analysis.channel_map.pins)
    slimmed = slim(model, calls[0], share=0.4, analysis=analysis)
    assert model.block.a.out_channels < 16
    got = [run_eval(model, call) for call in calls]
    slimmed.undo_log.undo()
    assert all(relative_error(one, run_eval(model, call)) <= TOLERANCE for one, call in zip(got, calls, strict=True))
