"""Nested subnets: each is a prefix, slices are views, and the dense model computes what it did."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import autogate
from autogate import subnets
from autogate.switching import SUBNETS
from tests.autogate.switching.nets import closed, small_net
from tests.slow import slow_but


@functools.cache
def _nested(name: str, **arguments):
    model, example = small_net(name, 160 if name == "test_vit" else 32)
    found = subnets.find(model, example, flops=(0.2, 0.5), by="l2", **arguments)
    return model, found, subnets.fuse(copy.deepcopy(model), found, nested=True), example


def nested(name: str = "test_resnet", **arguments):
    return copy.deepcopy(_nested(name, **arguments))


@pytest.mark.parametrize("name", slow_but(["test_resnet"], ["test_resnet", "test_vit", "test_efficientnet"]))
def test_every_subnet_is_what_it_would_be_out_of_order(name):
    model, found, ordered, example = nested(name)
    plain = subnets.fuse(copy.deepcopy(model), found)
    for number in (2, 0, 1):
        outputs = []
        for one in (ordered, plain):
            subnets.switch(one, number)
            one.zero_grad()
            outputs.append(one.train()(example))
            outputs[-1].square().mean().backward()
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10)
        norms = [
            sorted(float(p.grad.norm()) for p in one.parameters() if p.grad is not None) for one in (ordered, plain)
        ]
        torch.testing.assert_close(*norms, rtol=1e-7, atol=1e-9)
        slim = subnets.extract(ordered.eval(), number)
        with torch.no_grad():
            torch.testing.assert_close(slim(example), ordered(example), rtol=1e-9, atol=1e-10)
    status = subnets.status(ordered)
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sum(row.kept_bytes for row in subnets.status(plain).rows) > 0.5 * dense
    copied = 0.2 if name == "test_vit" else 0.02  # queries, keys and values lie behind one another in one kernel
    assert sum(row.kept_bytes for row in status.rows) < copied * dense


def test_slices_are_views_and_follow_the_weights_whoever_writes_to_them():
    _, _, ordered, example = nested()
    subnets.switch(ordered, 0)
    assert ordered.fc.weight.untyped_storage().data_ptr() == ordered.fc._parameters["weight"].data_ptr()
    with torch.no_grad():
        before = ordered(example)
        ordered.fc._parameters["weight"].data.zero_()
        assert not torch.equal(ordered(example), before)
        assert torch.equal(ordered(example), subnets.extract(ordered, 0)(example))


def test_a_copy_shares_nothing():
    _, _, ordered, example = nested()
    subnets.switch(ordered, 0)
    with torch.no_grad():
        copied, before = copy.deepcopy(ordered), ordered(example)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(ordered(example), before) and not copied(example).any()


def test_a_nested_model_comes_back_from_its_file(tmp_path):
    _, _, ordered, example = nested(shortcuts="conv")
    subnets.switch(ordered, 1)
    autogate.save(ordered, tmp_path / "nested.safetensors")
    loaded = autogate.load(tmp_path / "nested.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(example), ordered(example))
    assert [row.kept_bytes for row in subnets.status(loaded).rows] == [
        row.kept_bytes for row in subnets.status(ordered).rows
    ]


def test_a_width_between_nested_subnets_is_a_prefix_too():
    _, _, ordered, _ = nested()
    subnets.switch(ordered, flops=0.35, between=True)
    slices = ordered._modules[SUBNETS].subnet.overlay.slices
    assert len(slices) > 5 and all(one.is_view for one in slices)


class Crossed(nn.Module):
    """Channels i and i + 8 of the first layer are coupled; the last layer reads some of the pairs the other way round.

    So not every pair can change places with every other.
    """

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        x = self.first(x).relu()
        other = self.other(x[:, :8] + x[:, 8:]).relu()
        return self.last(torch.cat([*(x[:, at : at + 2] for at in (8, 2, 12, 6, 0, 10, 4, 14)), other], 1))


def test_channels_stay_in_place_where_their_position_matters():
    torch.manual_seed(1)
    model, example = Crossed().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    wide, narrow = (autogate.prepare(copy.deepcopy(model), example) for _ in range(2))
    for one, labels in ((wide, [0, 5, 6]), (narrow, [0, 1, 5, 6, 8, 9])):
        autogate.gates(one).close(torch.tensor(labels))
    found = subnets.of(narrow, wide, names=["narrow", "wide"])
    ordered = subnets.fuse(copy.deepcopy(model), found, nested=True)
    plain = subnets.fuse(copy.deepcopy(model), found)
    before, after = (dict(one.named_parameters()) for one in (model, ordered))
    assert torch.equal(before["first.weight"], after["first.weight"])
    assert not torch.equal(before["other.weight"], after["other.weight"])
    for name in ("narrow", "wide", "full"):
        for one in (ordered, plain):
            subnets.switch(one, name)
        torch.testing.assert_close(ordered(example), plain(example), rtol=1e-10, atol=1e-10)


def test_subnets_that_are_not_nested_are_refused_and_nothing_is_left():
    model, example = small_net()
    found = subnets.of(closed(model, example, 0.4, 0), closed(model, example, 0.6, 1), names=["a", "b"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(autogate.AutogateError, match=r"(?s)\[\d\] at .*'a' has \d+ classes.*'b', lacks.*aren't nested"):
        subnets.fuse(model, found, nested=True)
    assert SUBNETS not in model._modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
