"""Faults of fake tensors: a forward that runs is recorded all the same."""

from __future__ import annotations

import pytest
from torch import Tensor, library, nn

from rewriters.analysis.analyse import analyse
from rewriters.errors import CaptureError
from rewriters.labelling.channel_map import Side
from rewriters.recording import real_results
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, conv, image


@library.custom_op("autogate_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x.contiguous()


@doubled.register_fake
def _(x: Tensor) -> Tensor:  # in another memory order than the result has
    return x.new_empty(x.transpose(1, 3).shape).transpose(1, 3)


@library.custom_op("autogate_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    raise RuntimeError("a fault of its own")


def network(call) -> Net:
    return Net(lambda m, x: m.c(m.b(m.a(x)) + call(m.a(x)).view(len(x), 4, -1).view(x.shape[0], 4, *x.shape[2:])),
               a=conv(3, 4), b=nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 4)), c=conv(4, 2))  # fmt: skip


@pytest.mark.parametrize("call", [doubled, halved], ids=["layout", "fails"])
def test_a_call_takes_its_layout_from_a_real_result(call):
    analysis = analyse(network(call), (image(),))
    assert not analysis.opaque
    assert Side("b.0.weight", 0) in analysis.channel_map.classes
    assert_exact(network(call).double(), (image().double(),))


def test_large_calls_are_not_run_for_real(monkeypatch):
    monkeypatch.setattr(real_results, "MOST_BYTES", 100)
    with pytest.raises(CaptureError, match="view size is not compatible"):
        analyse(network(doubled), (image(),))


def test_a_forward_that_is_wrong_is_told_as_before():
    with pytest.raises(CaptureError, match="the forward fails on the example inputs"):
        analyse(Net(lambda m, x: m.a(x).view(7, -1), a=conv(3, 4)), (image(),))
