"""What a forward does in train mode alone counts as much as what it does in eval mode."""

import copy
import importlib

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis import analyse
from rewriters.analysis.capture_modes import capture_modes
from rewriters.outputs import relative_error
from rewriters.recording import capture
from tests.rewriters.exactness import TOLERANCE, place_statistics, random_live, slim, zero_kernels
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, reasons


def channel_dropout_by_hand(y):
    return y * (torch.rand(y.shape[0], y.shape[1], 1, 1, dtype=y.dtype) < 0.5)


ONLY_WHEN_TRAINING = {
    "softmax": lambda y: y.softmax(1),
    "mean": lambda y: y - y.mean(1, keepdim=True),
    "slice": lambda y: F.pad(y[:, 2:], (0, 0, 0, 0, 2, 0)),
    "swap": lambda y: torch.cat([y[:, 4:], y[:, :4]], 1),
    "chunk": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "channel dropout": channel_dropout_by_hand,
}


def network(change):
    def forward(m, x):
        y = m.a(x)
        return m.b((change(y) if m.training else y).relu())

    torch.manual_seed(0)
    return Net(forward, a=conv(3, 8), b=conv(8, 4)).double()


@pytest.mark.parametrize("name", ONLY_WHEN_TRAINING)
def test_the_slim_network_trains_what_the_gated_one_trains(name):
    gated, x = network(ONLY_WHEN_TRAINING[name]), image().double()
    slimmed = slim(copy.deepcopy(gated), (x,), share=0.5, seed=1)
    channel_map = slimmed.analysis.channel_map
    live = random_live(channel_map.size, 0.5, 1)
    zero_kernels(gated, channel_map, live)
    place_statistics(gated, slimmed.analysis, live)
    outputs = []
    for model in (gated, slimmed.model):
        torch.manual_seed(0)
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)


def test_what_mixes_channels_in_train_mode_only_keeps_them():
    found = analyse(network(ONLY_WHEN_TRAINING["softmax"]), (image().double(),)).channel_map
    assert is_pinned(found, "a.weight", 0)
    assert "aten._softmax.default: mixed along its channels" in reasons(found, "a.weight", 0)


RANDOM_MASKS = {
    "dropout": lambda y: F.dropout(y, 0.2, True),
    "dropout in place": lambda y: F.dropout(y, 0.2, True, inplace=True),
    "dropped samples": lambda y: y * y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.9).div_(0.9),
    "dropped samples, by comparison": lambda y: y.div(0.9) * (torch.rand(len(y), 1, 1, 1) + 0.9).floor(),
    "noise": lambda y: y * (1 + torch.randn_like(y)),
}


@pytest.mark.parametrize("name", list(RANDOM_MASKS)[:3])
def test_a_forward_that_masks_at_random_is_recorded_once(name):
    assert len(capture_modes(network(RANDOM_MASKS[name]), (image().double(),), {}).captures) == 1


@pytest.mark.parametrize("name", RANDOM_MASKS)
def test_a_forward_that_masks_at_random_keeps_no_channels(name):
    assert analyse(network(RANDOM_MASKS[name]), (image().double(),)).channel_map.size == 8


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_real_models_are_recorded_once(name):
    model = timm.create_model(name, drop_path_rate=0.2)
    assert len(capture_modes(model, (torch.empty(2, 3, 224, 224),), {}).captures) == 1


def test_a_forward_that_wants_targets_to_train_is_recorded_in_eval_mode():
    def forward(m, x, targets=None):
        y = m.b(m.a(x).relu())
        return ((y - targets) ** 2).mean() if m.training else y

    model = Net(forward, a=conv(3, 8), b=conv(8, 4))
    assert len(capture_modes(model, (image(),), {}).captures) == 1
    assert analyse(model, (image(),)).channel_map.size == 8


def test_a_block_that_runs_other_code_in_each_mode_is_traced_in_both():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.extra = conv(8, 8), conv(4, 4)

        def forward(self, x):
            first, second = self.inner(x).chunk(2, 1)
            return torch.cat([self.extra(first), second], 1) if self.training else torch.cat([first, second], 1)

    model = Net(lambda m, x: m.out(m.block(m.a(x))), a=conv(3, 8), block=Block(), out=conv(8, 2)).double()
    slimmed = slim(model, (image().double(),), share=0.5, seed=1)
    assert slimmed.error < 1e-12
    assert {mode for traced in slimmed.analysis.traced for mode in traced.modes} == {False, True}
    assert slimmed.plan.forwards.keys() == {"block"}
    model.train()(image().double())


class LeavesOut(nn.Module):
    """Leaves out a layer at random, and adds a parameter in train mode only, as wav2vec 2.0 does."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.head = conv(3, 8), nn.GroupNorm(1, 8), conv(8, 8), conv(8, 2)
        self.mask = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        y = self.norm(self.a(x))
        if self.training:
            if x.shape[-1] > 4 and x.sum().item() > 0:  # this can't be recorded
                y = y * 2
            y = y + self.mask
            if torch.rand(()) < 0.3:
                return self.head(y)
        return self.head(y + self.b(y))


def test_what_train_mode_adds_is_seen_although_it_leaves_layers_out():
    model, x = LeavesOut().double().eval(), image().double()
    for others in ((), [((image(size=6).double(),), {})]):
        analysis = analyse(model, (x,), others=others)
        assert classes(analysis.channel_map, "mask", 0) == classes(analysis.channel_map, "a.weight", 0)
        assert not is_pinned(analysis.channel_map, "mask", 0)


class Mixing(nn.Module):
    """Mixes its channels if it is told to, by its attribute or its argument."""

    mix = False

    def forward(self, x, mix=False):
        return x.softmax(1) if mix or self.mix else x


def sets_an_attribute_of_a_layer(m, x):
    m.mixing.mix = m.training
    return m.b(m.mixing(m.a(x)))


def leaves_an_attribute_of_a_layer(m, x):
    if not m.training:
        m.mixing.mix = True
    return m.b(m.mixing(m.a(x)))


def calls_in_another_order(m, x):
    x = m.a(x)
    return m.d(m.c(x)) if m.training else m.c(m.d(x))


def leaves_out_an_activation(m, x):
    x = m.a(x)
    return m.b(x if m.training else m.act(x))


CHANGES_ITS_LAYERS = {
    "sets an attribute": sets_an_attribute_of_a_layer,
    "leaves an attribute": leaves_an_attribute_of_a_layer,
    "gives another argument": lambda m, x: m.b(m.mixing(m.a(x), m.training)),
    "gives another keyword": lambda m, x: m.b(m.mixing(m.a(x), mix=m.training)),
    "calls in another order": calls_in_another_order,
    "leaves out an activation": leaves_out_an_activation,
    "asks inside": lambda m, x: m.b(F.dropout(m.asking(m.a(x)), 0.2, m.training)),
}


@pytest.mark.parametrize("name", CHANGES_ITS_LAYERS)
def test_layers_that_are_run_otherwise_in_train_mode_are_noticed(name):
    layers = {"a": conv(3, 4), "b": conv(4, 4), "c": conv(4, 4), "d": conv(4, 4), "act": nn.ReLU(inplace=True)}
    asking = Net(lambda m, x: x.softmax(1) if m.training else x)
    model = Net(CHANGES_ITS_LAYERS[name], **layers, mixing=Mixing(), asking=asking)
    assert capture_modes(model, (image(),), {}).trains_otherwise


def test_only_the_code_that_asks_runs_again(monkeypatch):
    module = importlib.import_module("rewriters.analysis.capture_modes")
    graphs = []

    def noted(*args):
        graphs.append(capture(*args))
        return graphs[-1]

    monkeypatch.setattr(module, "capture", noted)
    layers = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), nn.Sequential(nn.Hardswish(True))
    model = Net(lambda m, x: m.out(F.dropout(m.inner(m.stem(x)), 0.2, m.training)), stem=layers[0], inner=layers[1],
                out=conv(4, 2))  # fmt: skip
    assert not capture_modes(model, (image(),), {}).trains_otherwise
    convolutions = [sum("convolution" in str(node.target) for node in one.graph.nodes) for one in graphs]
    assert convolutions == [2, 0]


def test_an_example_that_runs_in_eval_mode_alone_is_traced_for_both():
    """As where a mask's values are asked for in train mode, by code around the block that is rewritten."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = conv(8, 16)

        def forward(self, x, mask=None):
            first, second = self.layer(x - x.mean(1, keepdim=True)).split([8, 8], 1)
            second = second if mask is None else second * mask
            return first.tanh() * second if self.training else first.relu() * second

    def forward(m, x, mask=None):
        if m.training and mask is not None:
            mask.tolist()
        return m.b(m.block(m.a(x), mask))

    torch.manual_seed(0)
    model = Net(forward, a=conv(3, 8), block=Block(), b=conv(8, 4)).double().eval()
    x, mask = image().double(), (torch.arange(4) > 1).double()
    analysis = analyse(model, (x,), others=[((x, mask), {})])
    slimmed = slim(model, (x,), share=0.6, seed=1, analysis=analysis)
    assert analysis.channel_map.size == 8 + 8 and "block" in slimmed.plan.forwards
    got = model.train()(x, mask)
    slimmed.undo_log.undo()
    assert relative_error([got], [model.train()(x, mask)]) <= TOLERANCE
