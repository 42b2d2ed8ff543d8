"""Variables of Python modules and closures that a forward names, and fields of objects given to other code."""

import copy
import functools
import pickle
import sys

import pytest
import torch
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.forwards.guards import ShapeGuardError
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, slim
from tests.rewriters.helpers import conv

HERE = sys.modules[__name__]


class Inner:
    def __init__(self):
        self.flag, self.deep = True, {"scale": 2.0}


class Configuration:
    steps = 2

    def __init__(self):
        self.inner, self.unnamed = Inner(), 1

    def scaled(self, y):
        return y * SCALE

    def fused(self):
        return FLAG


SCALE, FLAG, KIND, SIZES, LIMIT = 2.0, True, "tanh", (1, 1), None
CONFIG, TABLE, COUNT, LOG = Configuration(), {"first": 2.0, "second": 3.0}, 0, []


def fused():
    return FLAG


def given(config, y):
    return -y if config.inner.flag else y


def looked_up(table, y):
    return y * table["first"]


def repeated(y):
    for _ in range(CONFIG.steps):
        y = y * 2
    return y


def scaled_by(scale):
    def wrapped(forward):
        @functools.wraps(forward)
        def run(m, y):
            return forward(m, y) * scale

        return run

    return wrapped


class Block(nn.Module):
    """The second half of the channels goes through an idiom, both halves end with other numbers of channels."""

    def __init__(self, name):
        super().__init__()
        self.idiom, self.config, self.table = IDIOMS[name], Configuration(), {"first": 2.0, "second": 3.0}
        self.a, self.b, self.head = conv(3, 16), conv(8, 8), conv(8, 4)

    def helper(self, y):
        return y * SCALE

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        return self.head(torch.tanh(first) * self.b(self.idiom(self, second)))


IDIOMS = {
    "number": lambda m, y: y * SCALE,
    "flag": lambda m, y: -y if FLAG else y,
    "text": lambda m, y: getattr(torch, KIND)(y),
    "tuple": lambda m, y: y * sum(SIZES),
    "None": lambda m, y: y * 2 if LIMIT is None else y.clamp(max=LIMIT),
    "of a module": lambda m, y: y * HERE.SCALE,
    "field": lambda m, y: y if CONFIG.inner.flag else -y,
    "field of a class": lambda m, y: y * Configuration.steps,
    "entry": lambda m, y: y * TABLE["first"],
    "loop": lambda m, y: repeated(y),
    "function without tensors": lambda m, y: y if fused() else -y,
    "method": lambda m, y: m.helper(y),
    "method of an object": lambda m, y: m.config.scaled(y),
    "method without tensors": lambda m, y: y if m.config.fused() else -y,
    "function of a module": lambda m, y: y if HERE.fused() else -y,
    "inner function": lambda m, y: (lambda value: value * SCALE)(y),
    "object given away": lambda m, y: given(m.config, y),
    "dict given away": lambda m, y: looked_up(m.table, y),
    "dict in an object": lambda m, y: y * m.config.inner.deep["scale"],
    "decorator": scaled_by(2.0)(lambda m, y: -y),
}
CHANGES = {
    "text": lambda patch, m: patch.setattr(HERE, "KIND", "relu"),
    "tuple": lambda patch, m: patch.setattr(HERE, "SIZES", (1, 2)),
    "flag": lambda patch, m: patch.setattr(HERE, "FLAG", False),
    "None": lambda patch, m: patch.setattr(HERE, "LIMIT", 1.0),
    "field": lambda patch, m: patch.setattr(CONFIG.inner, "flag", False),
    "field of a class": lambda patch, m: patch.setattr(Configuration, "steps", 3),
    "entry": lambda patch, m: patch.setitem(TABLE, "first", 3.0),
    "loop": lambda patch, m: patch.setattr(Configuration, "steps", 3),
    "function without tensors": lambda patch, m: patch.setattr(HERE, "FLAG", False),
    "method without tensors": lambda patch, m: patch.setattr(HERE, "FLAG", False),
    "function of a module": lambda patch, m: patch.setattr(HERE, "FLAG", False),
    "object given away": lambda patch, m: patch.setattr(m.config.inner, "flag", False),
    "dict given away": lambda patch, m: patch.setitem(m.table, "first", 3.0),
    "dict in an object": lambda patch, m: patch.setitem(m.config.inner.deep, "scale", 3.0),
    "decorator": lambda patch, m: patch.setattr(IDIOMS["decorator"].__closure__[-1], "cell_contents", 3.0),
}  # fmt: skip


def slim_and_gated(model):
    slimmed = slim(model, (values(2, 3, 4, 4),), share=0.6, seed=1)
    assert "" in slimmed.plan.forwards and slimmed.error <= TOLERANCE
    gated = copy.deepcopy(model)
    slimmed.undo_log.undo()
    return gated, model


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", IDIOMS)
def test_variables_outside_of_a_forward_are_guarded(name, monkeypatch):
    torch.manual_seed(0)
    slim_model, gated = slim_and_gated(Block(name).double().eval())
    slim_model.idiom = None  # a lambda can't be pickled
    models = slim_model, copy.deepcopy(slim_model), pickle.loads(pickle.dumps(slim_model))
    x = values(3, 3, 6, 5)
    slim_model.config.unnamed = TABLE["second"] = 5.0
    for model in models:
        assert relative_error(run_eval(model, (x,)), run_eval(gated, (x,))) <= TOLERANCE
    change = CHANGES.get(name, lambda patch, m: patch.setattr(HERE, "SCALE", 3.0))
    before = run_eval(gated, (x,))
    for model in (gated, *models):
        change(monkeypatch, model)
    assert relative_error(run_eval(gated, (x,)), before) > 1e-3
    for model in models[: 2 if name == "decorator" else 3]:  # a closure isn't pickled
        with pytest.raises(ShapeGuardError, match=r"was .*, which now is .*set it before prepare"):
            model(x)


def counted(m, y):
    global COUNT
    COUNT += 1
    return y * COUNT


def left_behind(m, y):
    global LIMIT
    LIMIT = y.mean()
    return y


def counter():
    calls = 0

    def counts(m, y):
        nonlocal calls
        calls += 1
        return y * calls

    return counts


@pytest.mark.parametrize("idiom", [counted, left_behind, counter()])
def test_a_forward_that_sets_a_variable_keeps_its_channels(idiom, monkeypatch):
    monkeypatch.setitem(IDIOMS, "set", idiom)
    monkeypatch.setattr(HERE, "LIMIT", None)
    found = analyse(Block("set").eval(), (values(2, 3, 4, 4).float(),)).channel_map
    assert any("it keeps the variable" in pin.reason for pin in found.pins)
    assert found.size == 0
