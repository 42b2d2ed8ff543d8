"""What the example inputs leave open is asked in prepare: other ways are traced too, and what has none is kept."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from autogate.slim.found_ways import FoundWays
from rewriters import AutogateError, VerificationError, relative_error, run_eval
from rewriters.forwards import ShapeGuardError
from rewriters.slimming import Checked, Probe


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1)


class Halves(nn.Module):
    """A block whose halves end with other numbers of channels, so that its forward is rewritten."""

    def __init__(self, idiom):
        super().__init__()
        self.idiom, self.a, self.b, self.c = idiom, conv(4, 16), conv(8, 8), conv(8, 4)

    def forward(self, x, *given, **named):
        first, second = self.a(x).chunk(2, 1)
        return self.c(torch.tanh(first) * self.b(self.idiom(second, *given, **named)))


class Net(nn.Module):
    def __init__(self, idiom):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4))
        self.block, self.head = Halves(idiom), conv(4, 2)

    def forward(self, x, mask=None):
        x = self.stem(x)
        return self.head(self.block(x) if mask is None else self.block(x, mask))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prepared(model, *inputs, **options):
    torch.manual_seed(0)
    model = autogate.prepare(model.double().eval(), inputs, flops=0.9, **options)
    bank = autogate.gates(model)
    with torch.no_grad():
        bank.alpha[torch.rand(len(bank.alpha), generator=torch.Generator().manual_seed(1)) < 0.4] = 0
    bank.fold()
    return model


def larger(x, samples=5, side=9):
    return F.interpolate(x, side).repeat(3, 1, 1, 1)[:samples]


def test_options_may_be_left_out():
    model = prepared(Net(lambda y, mask=None: y if mask is None else y * mask), IMAGES, MASK)
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert "forward" in vars(slim.block)
    for inputs in ((IMAGES, MASK), (IMAGES,), (larger(IMAGES), larger(MASK)), (larger(IMAGES),)):
        assert relative_error(run_eval(slim, inputs), run_eval(gated, inputs)) < 1e-12
    assert not autogate.gates(prepared(Net(lambda y, mask=None: y), IMAGES)).origin.options.others


class Streaming(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(8, 8), conv(8, 2)

    def forward(self, x, state=None):
        first, second = self.a(x).chunk(2, 1)
        y = torch.tanh(first) * self.b(second)
        if state is not None:
            y = y + state.flip(0)
        y = self.c(y)
        return y, y.mean(1, keepdim=True)


def test_a_state_that_is_none_at_first_may_be_given_back():
    model = prepared(Streaming(), IMAGES)
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert slim.a.out_channels < 16
    state = larger(MASK)
    for inputs in ((IMAGES,), (larger(IMAGES), state)):
        assert relative_error(run_eval(slim, inputs), run_eval(gated, inputs)) < 1e-12


def frames(y):
    return torch.stack([frame * 2 for frame in y.unbind(3)], 3)


def by_batch(y):
    return y * 2 if len(y) > 2 else y


@pytest.mark.parametrize("idiom", [frames, by_batch])
def test_a_module_keeps_its_channels_where_sizes_decide_its_way(idiom):
    model = prepared(Net(idiom), IMAGES)
    assert any(pin.module == "block" for pin in autogate.gates(model).channel_map.pins)
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    for side in (6, 9, 4):
        inputs = (larger(IMAGES, side=side),)
        assert relative_error(run_eval(slim, inputs), run_eval(gated, inputs)) < 1e-12


@pytest.mark.parametrize("idiom", [frames, by_batch])
def test_finalize_refuses_what_was_not_asked_in_prepare(idiom):
    model = prepared(Net(idiom), IMAGES, probe=False)
    with pytest.raises(VerificationError, match=r"for .*: .*'block'.*probe=False"):
        autogate.finalize(model, warn=False)
    slim = autogate.finalize(model, warn=False, probe=False)
    with pytest.raises(ShapeGuardError):
        slim(larger(IMAGES))


class Frame(Halves):
    """What a loop over frames does with each, and with what the last one left; the state is None at first."""

    def forward(self, x, state=None):
        first, second = self.a(x).chunk(2, 1)
        new = self.c(torch.tanh(first) * self.b(second))
        return new if state is None else new + state / 2


class Frames(Net):
    def __init__(self):
        super().__init__(None)
        self.block = Frame(None)

    def forward(self, clip):
        state = None
        for frame in clip.unbind(1):
            state = self.block(self.stem(frame), state)
        return self.head(state)


def test_a_loop_whose_body_is_a_module_takes_any_number_of_rounds():
    clip = torch.stack([IMAGES * factor for factor in range(1, 10)], 1)
    model = prepared(Frames(), clip[:, :2])
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert "forward" in vars(slim.block) and "forward" not in vars(slim)
    for frames in (1, 2, 3, 9):
        inputs = (clip[:1, :frames],)
        assert relative_error(run_eval(slim, inputs), run_eval(gated, inputs)) < 1e-12


class Wide(Halves):
    """Asks for a size of its argument."""

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        return self.c(first * self.b(second) if x.shape[-1] > 6 else torch.tanh(first) - self.b(second))


def test_a_module_that_asks_for_a_size_is_rewritten_for_both_ways():
    net = Net(None)
    net.block = Wide(None)
    model = prepared(net, IMAGES)
    gated, slim = copy.deepcopy(model), autogate.finalize(model, warn=False)
    assert "forward" in vars(slim.block)
    for side in (6, 9, 4):
        inputs = (larger(IMAGES, side=side),)
        assert relative_error(run_eval(slim, inputs), run_eval(gated, inputs)) < 1e-12


def test_a_refusal_says_that_the_model_can_be_slim_for_inputs_like_the_example():
    with pytest.raises(AutogateError, match="probe=False"):
        autogate.prepare(Halves(frames).eval(), torch.randn(2, 4, 6, 6))


def test_examples_that_the_model_was_changed_for_stay():
    """Neither is one added nor left, though a forward takes a third way."""
    question = Probe("for four samples", lambda inputs: ((IMAGES.repeat(2, 1, 1, 1),), {}))
    beyond = Checked(True, asked=(0, replace(question, what="for five", beyond=question.what)), takes_other_way=True)
    ways = FoundWays(((IMAGES,), {}))
    assert ways.add(Net(torch.relu).double(), replace(beyond, asked=(0, question)))
    ways.close()
    ways.leave(beyond)
    assert not ways.add(Net(torch.relu).double(), beyond) and len(ways.examples) == 2
