"""Convolutions whose kernel is computed in the forward: their FLOPs are those that run."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import autogate
import rewriters
from autogate.budget.products import Activations, Flops
from benchmarks.parts import PRODUCTS_WITH_KERNELS, kill, recorded_flops
from rewriters.labelling.channel_map import Side
from tests.rewriters.helpers import Net, conv, image


def conditional(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As CondConv: a kernel for each sample, all of them in one grouped convolution."""
    x = net.stem(x).relu()
    kernels = (net.route(x.mean((2, 3))).sigmoid() @ net.experts).view(-1, 8, 3, 3)
    x = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=len(x), padding=1).view(len(x), -1, *x.shape[2:])
    return net.head(net.inner(x).relu())


def mixed(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One kernel for the whole batch."""
    x = net.stem(x).relu()
    first, second = net.route(x.mean((2, 3))).sigmoid().mean(0)
    return net.head(net.inner(F.conv2d(x, first * net.experts[0] + second * net.experts[1], padding=1)).relu())


def net(forward) -> nn.Module:
    torch.manual_seed(0)
    shape = (2, 6 * 8 * 9) if forward is conditional else (2, 6, 8, 3, 3)
    experts = nn.Parameter(torch.randn(shape))
    return Net(forward, stem=conv(3, 8, 3), route=nn.Linear(8, 2), inner=conv(6, 16), head=conv(16, 4), experts=experts)


MIXTURE = 6 * 8 * 9 * 16
"""Multiply-adds of a 3x3 kernel of 6 x 8 channels at 4 x 4 places."""


@pytest.mark.parametrize("forward", [conditional, mixed])
def test_flops_are_those_that_run(forward):
    model, inputs = net(forward), ((image(),), {})
    dense = recorded_flops(model, inputs, of=PRODUCTS_WITH_KERNELS)
    model = autogate.prepare(model, image(), flops=1.0)
    summary = autogate.summary(model)
    assert summary.all_flops == summary.flops == dense
    assert [layer.macs for layer in summary.layers if layer.inputs == layer.outputs == 1] == [MIXTURE]

    channel_map = autogate.gates(model).channel_map
    assert Flops(channel_map).whole == dense
    experts = 2 * 6 * 8 * 9 if forward is conditional else 0  # mixing them is a matrix product
    given = (8 + 6 + 16 + 4) * 16 + 2 + experts / 2
    assert Activations(channel_map, model).whole == torch.float32.itemsize * given

    kill(model, 0.5)
    left = autogate.summary(model).flops
    slim = autogate.finalize(model, warn=False)
    assert recorded_flops(slim, inputs, of=PRODUCTS_WITH_KERNELS) == left < dense


@pytest.mark.slow
def test_conditional_convolutions_of_timm():
    model, example = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=10), torch.randn(2, 3, 64, 64)
    dense = recorded_flops(model, ((example,), {}), of=PRODUCTS_WITH_KERNELS)
    summary = autogate.summary(autogate.prepare(model, example, flops=1.0))
    assert summary.all_flops == pytest.approx(dense, rel=1e-9)
    assert 0.2 < summary.reach < 0.65


def test_gates_reach_such_a_kernel_where_its_outputs_may_go():
    reach = {}
    for forward in (conditional, mixed):
        model = autogate.prepare(net(forward), image(), flops=1.0)
        whole = autogate.summary(model).all_flops
        reach[forward] = autogate.summary(model).reach, MIXTURE / whole
    assert reach[conditional][0] <= 1 - reach[conditional][1]
    assert reach[mixed][0] >= reach[mixed][1]


def test_a_computed_kernel_in_a_branch_that_goes_counts_no_more():
    torch.manual_seed(0)
    kernels = nn.Parameter(torch.randn(2, 4, 8, 1, 1))
    branch = Net(lambda own, x: F.conv2d(x, own.kernels[0] + own.kernels[1]).relu(), kernels=kernels)
    model = Net(
        lambda own, x: own.head((y := own.stem(x)) + own.out(own.branch(y))),
        stem=conv(3, 8), branch=branch, out=conv(4, 8), head=conv(8, 4),
    ).eval()  # fmt: skip
    channel_map = (analysis := rewriters.analyse(model, (image(),))).channel_map
    live = torch.ones(channel_map.size, dtype=torch.bool)
    assert rewriters.plan(model, analysis, live, (image(),)).flops(channel_map) == 16 * (3 * 8 + 8 * 4 + 4 * 8 + 8 * 4)
    live[channel_map.classes[Side("out.weight", 1)]] = False
    nn.init.zeros_(model.out.weight)
    slim = rewriters.plan(model, analysis, live, (image(),))
    assert "branch" in slim.removed
    assert slim.flops(channel_map) == 16 * (3 * 8 + 8 * 4)
