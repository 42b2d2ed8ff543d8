"""What `ignore` takes: names, globs, modules, parameters and types of modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autogate
from autogate.naming import named_by


def net() -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    return nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.Conv2d(8, 2, 1))


BLOCK = ["1.0.weight", "1.0.bias"]
NORM = ["1.1.weight", "1.1.bias", "1.1.running_mean", "1.1.running_var", "1.1.num_batches_tracked"]


@pytest.mark.parametrize(
    ("ignore", "named"),
    [
        ("1.0", BLOCK),
        (["1.0", "1.1"], BLOCK + NORM),
        ("*.bias", ["0.bias", "1.0.bias", "1.1.bias", "2.bias"]),
        ("1.*", BLOCK + NORM),
        (lambda model: model[1], BLOCK + NORM),
        (lambda model: [model[1][0], "1.1"], BLOCK + NORM),
        (lambda model: model[1][0].weight, ["1.0.weight"]),
        (nn.BatchNorm2d, NORM),
        ((nn.BatchNorm2d, "1.0.*"), NORM + BLOCK),
        ((), []),
    ],
)
def test_what_it_refers_to(ignore, named):
    model = net()
    found = named_by(model, ignore(model) if callable(ignore) and not isinstance(ignore, type) else ignore)
    assert sorted(found) == sorted(named) and len(found) == len(named)


def test_a_module_with_two_names_has_both():
    model = net()
    model.again = model[1]
    assert {"1.0.weight", "again.0.weight"} <= set(named_by(model, model[1]))


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("2.weigth", r"ignore names '2.weigth', which is neither a module nor a parameter.*Did you mean '2.weight'"),
        ("attn.*", r"ignore names 'attn\.\*'"),
        (3, "ignore has 3, of type int. Give names of modules"),
        ([None], "ignore has None, of type NoneType"),
        (int, "ignore has <class 'int'>, of type type"),
        (nn.LSTM, "ignore has LSTM, of which the model has none"),
        (nn.Linear(2, 2), "ignore has an object of type Linear that isn't in it"),
    ],
)
def test_what_it_refuses(ignore, message):
    with pytest.raises(autogate.AutogateError, match=message):
        named_by(net(), ignore)


def test_prepare_takes_them():
    model, example = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)), torch.randn(2, 3, 4, 4)
    autogate.prepare(model, example, ignore=model[0], flops=0.9)
    assert [pin.sides[0].tensor for pin in autogate.summary(model).pins if "caller" in pin.reason] == ["0.weight"]
    with pytest.raises(autogate.AutogateError, match="none of its channels can be removed"):
        autogate.prepare(net(), example, ignore=nn.Conv2d)
