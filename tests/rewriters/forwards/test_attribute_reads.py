"""Attributes that a forward reads: numbers are followed, what decides its control flow is guarded."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.forwards.guards import ShapeGuardError
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, place_statistics, random_live, slim
from tests.rewriters.forwards.networks import traced
from tests.rewriters.helpers import Net, analysed, conv, image, mapped


class Configuration:
    """An object with fields, one of them its class's."""

    scale = 2.0

    def __init__(self) -> None:
        self.flag, self.other = True, 1


class Inner(nn.Module):
    """A block with attributes of its own, whose forward is rewritten because it cuts its channels in two."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b, self.drop = conv(4, 16), conv(8, 8), nn.Dropout(0.5)
        self.number, self.count, self.flag, self.sizes, self.name = 2.0, 2, True, (1, 1), "tanh"
        self.config, self.scales = Configuration(), {"first": 2.0, "second": 3.0}

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        return torch.tanh(first) * self.b(self.function(self, second))


def slim_and_gated(function):
    block = Inner(function)
    model = Net(lambda m, x: m.head(m.block(m.stem(x))), stem=conv(3, 4), block=block, head=conv(8, 2)).double().eval()
    slimmed = slim(model, (image().double(),), share=0.6, seed=3)
    assert "block" in slimmed.plan.forwards and slimmed.error <= TOLERANCE
    gated = copy.deepcopy(model)
    slimmed.undo_log.undo()
    return gated, model


FOLLOWED = {
    "factor": ("number", 0.5, lambda m, y: y / m.number),
    "two factors": ("count", 3, lambda m, y: y * m.count**0.5),
    "argument": ("number", 3.0, lambda m, y: F.leaky_relu(y, m.number)),
    "keyword": ("number", 0.01, lambda m, y: y.clamp(max=m.number)),
    "of a child": ("drop.p", 0.25, lambda m, y: y * m.drop.p),
    "dimension": ("count", 3, lambda m, y: y.flip(m.count)),
    "size": ("count", 4, lambda m, y: y.reshape(-1, m.count, *y.shape[1:]).flip(0).reshape(y.shape)),
    "slice": ("count", 1, lambda m, y: F.pad(y[..., m.count :], (m.count, 0))),
    "helper": ("number", 0.5, lambda m, y: (lambda number: y.sub(number))(m.number)),
    "product with a size": ("number", 0.5, lambda m, y: y * m.number / (y.shape[1] * y.shape[2])),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_numbers_that_are_computed_with_are_followed(case):
    name, value, function = FOLLOWED[case]
    models = slim_and_gated(function)
    x = image(batch=4).double()
    before = run_eval(models[0], (x,))
    for model in models:
        path, _, own = name.rpartition(".")
        setattr(model.block.get_submodule(path), own, value)
    assert relative_error(before, run_eval(models[1], (x,))) > 1e-6
    assert relative_error(run_eval(models[0], (x,)), run_eval(models[1], (x,))) <= TOLERANCE


def looped(m, y):
    for _ in range(m.count):
        y = y * 2
    return y


GUARDED = {
    "flag": ("flag", False, lambda m, y: -y if m.flag else y),
    "loop": ("count", 3, looped),
    "repeated list": ("count", 3, lambda m, y: sum([y] * m.count)),
    "comparison": ("number", -1.0, lambda m, y: y * m.number if m.number > 0 else y),
    "tuple": ("sizes", (0, 0), lambda m, y: F.pad(y, m.sizes)[..., 2:]),
    "text": ("name", "relu", lambda m, y: getattr(torch, m.name)(y)),
    "None": ("name", None, lambda m, y: y if m.name is None else -y),
    "type": ("count", 3, lambda m, y: y * m.count if type(m.count) is int else y),
    "key": ("count", 1, lambda m, y: y * {1: 3.0, 2: 5.0}[m.count]),
    "text with a number": ("count", 1, lambda m, y: y * {"at1": 3.0, "at2": 5.0}[f"at{m.count}"]),
    "mode of a child": ("drop.training", True, lambda m, y: -y if m.drop.training else y),
}  # fmt: skip


@pytest.mark.parametrize("case", GUARDED)
def test_what_decides_the_control_flow_is_guarded(case):
    name, value, function = GUARDED[case]
    slim_model, gated = slim_and_gated(function)
    x = image(batch=3, size=5).double()
    assert relative_error(run_eval(slim_model, (x,)), run_eval(gated, (x,))) <= TOLERANCE
    path, _, own = name.rpartition(".")
    slim_model.block.function = None  # a lambda can't be pickled
    for block in (slim_model.block, copy.deepcopy(slim_model).block, pickle.loads(pickle.dumps(slim_model.block))):
        setattr(block.get_submodule(path), own, value)
        with pytest.raises(ShapeGuardError, match=r"block: .* at .*test_attribute_reads:\d+ \(.*set it before prepare"):
            block(x[:, :1].expand(-1, block.a.in_channels, -1, -1))


def through_a_variable(m, y):
    config = m.config
    return y * config.flag


PARTS = {
    "field": (lambda m: setattr(m.config, "flag", False), lambda m, y: -y if m.config.flag else y),
    "field of a class": (lambda m: setattr(m.config, "scale", 1.0), lambda m, y: y * m.config.scale),
    "by another name": (lambda m: setattr(m.config, "flag", False), through_a_variable),
    "entry": (lambda m: m.scales.update(first=1.0), lambda m, y: y * m.scales["first"]),
}


@pytest.mark.parametrize("case", PARTS)
def test_fields_and_entries_that_the_code_names_are_guarded(case):
    """Others may change."""
    change, function = PARTS[case]
    slim_model, gated = slim_and_gated(function)
    x = image(batch=3).double()
    slim_model.block.config.other, slim_model.block.scales["second"] = 2, 0.0
    assert relative_error(run_eval(slim_model, (x,)), run_eval(gated, (x,))) <= TOLERANCE
    change(slim_model.block)
    with pytest.raises(ShapeGuardError, match=r"block: .* self\.(config|scales)\.\w+ at .*set it before prepare"):
        slim_model(x)


def test_children_have_the_mode_of_the_module():
    def function(m, y):
        return F.dropout(y, 1.0, m.drop.training)

    slim_model, gated = slim_and_gated(function)
    x = image().double()
    assert relative_error([slim_model.train()(x)], [gated.train()(x)]) <= TOLERANCE
    assert relative_error([slim_model.eval()(x)], [gated.eval()(x)]) <= TOLERANCE
    assert relative_error([slim_model.train()(x)], [gated.eval()(x)]) > 1e-3


def test_widths_are_no_attributes_to_follow():
    """Slimming changes them, or must not follow them."""
    graph = traced(Net(lambda m, x: m.b(m.a(x).view(-1, m.a.out_channels, 16).unflatten(2, (4, 4)) / m.a.out_channels),
                       a=conv(3, 8), b=conv(8, 2)), image())  # fmt: skip
    assert not [node for node in graph.nodes if node.op == "get_attr"]


def test_live_statistics_follow_a_temperature():
    def forward(m, x):
        y = m.a(x)
        return m.head((y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + m.eps).sqrt() / m.temperature)

    model = Net(forward, a=conv(3, 8), head=conv(8, 2)).double().eval()
    model.temperature, model.eps = 1.0, 1e-5
    found = analysed(forward, a=model.a.float(), head=model.head.float(), temperature=1.0, eps=1e-5)
    assert found.sites
    place_statistics(model.float(), found, random_live(found.channel_map.size, 1.0, 0))
    dense, x = copy.deepcopy(model), image()
    del dense.__dict__["forward"]
    assert torch.equal(model(x), dense(x))
    for one in (model, dense):
        one.temperature, one.eps = 4.0, 0.1
    assert torch.equal(model(x), dense(x))


def test_a_forward_that_counts_its_calls_keeps_its_channels():
    def forward(m, x):
        m.calls = m.calls + 1
        first, second = m.a(x).chunk(2, 1)
        return m.head(first * m.b(second) * m.calls)

    found = mapped(forward, a=conv(3, 16), b=conv(8, 8), head=conv(8, 4), calls=1)
    assert any("it keeps calls from one call to the next" in pin.reason for pin in found.pins)
