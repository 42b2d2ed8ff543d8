"""A constant in the place of a dead branch is right for inputs of other sizes than the example's."""

import copy

import pytest
import torch
from torch import nn

from rewriters.analysis import analyse
from rewriters.outputs import relative_error, run_eval
from rewriters.slimming.plan import apply, plan
from rewriters.undo_log import UndoLog
from tests.rewriters.exactness import zero_kernels
from tests.rewriters.helpers import Net, conv


def without(model, example, inner):
    """The model as training left it, with the output channels of the layer `inner` dead, and its slim copy."""
    model = model.double().eval()
    analysis = analyse(model, (example,))
    classes = analysis.channel_map.classes[(f"{inner}.weight", 0)]
    live = torch.ones(analysis.channel_map.size, dtype=torch.bool)
    live[classes] = False
    zero_kernels(model, analysis.channel_map, live)
    gated = copy.deepcopy(model)
    slim_plan = plan(model, analysis, live, (example,))
    apply(model, slim_plan, UndoLog())
    return gated, model, slim_plan


def agree(gated, slim, *inputs):
    for x in inputs:
        wanted, got = run_eval(gated, (x,)), run_eval(slim, (x,))
        assert [one.shape for one in got] == [one.shape for one in wanted]
        assert relative_error(got, wanted) < 1e-9


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def residual(m, x):
    x = m.stem(x)
    return m.head(x + m.outer(m.inner(x).relu()))


def linear_net(forward, **members):
    return Net(forward, stem=nn.Linear(5, 8), inner=nn.Linear(8, 12), outer=nn.Linear(12, 8), head=nn.Linear(8, 3),
               **members)  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 6, 5), (6, 5), (2, 4, 6, 5), (2, 1, 5), (1, 6, 5)])
def test_channels_along_the_last_dimension(shape):
    gated, slim, slim_plan = without(linear_net(residual), values(*shape), "inner")
    assert slim_plan.removed == {"inner", "outer"}
    batch, *middle = shape[:-1]
    agree(gated, slim, values(*shape), values(batch + 3, *(1 for _ in middle), 5), values(1, *(9 for _ in middle), 5))


@pytest.mark.parametrize("kind, dims", [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_channels_along_the_second_dimension(kind, dims):
    layers = {"stem": kind(5, 8, 1), "inner": kind(8, 12, 3, padding=1), "outer": kind(12, 8, 1), "head": kind(8, 3, 1)}
    gated, slim, slim_plan = without(Net(residual, **layers), values(2, 5, *[4] * dims), "inner")
    assert slim_plan.removed == {"inner", "outer"}
    agree(gated, slim, values(3, 5, *[1] * dims), values(1, 5, *range(5, 5 + dims)))


def test_both_operands_of_an_add_are_dead():
    def forward(m, x):
        x = m.stem(x)
        y = m.inner(x).relu()
        return m.head(x + (m.outer(y) + m.second(y)))

    gated, slim, slim_plan = without(linear_net(forward, second=nn.Linear(12, 8)), values(2, 6, 5), "inner")
    assert slim_plan.removed == {"inner", "outer", "second"}
    agree(gated, slim, values(3, 1, 5), values(1, 9, 5))


def test_a_branch_that_alone_gives_the_batch_its_size_stays_one_channel_wide():
    def forward(m, x):
        return m.head(m.positions + m.outer(m.inner(m.stem(x)).relu())) * x.mean()

    net = linear_net(forward, positions=nn.Parameter(values(1, 6, 8)))
    gated, slim, _ = without(net, values(1, 6, 5), "inner")
    agree(gated, slim, values(1, 6, 5), values(3, 6, 5))


@pytest.mark.parametrize("total", [
    lambda y: y.sum(1, keepdim=True), lambda y: y * y.shape[1], lambda y: y.cumsum(1)[:, -1:],
    lambda y: y.norm(dim=1, keepdim=True), lambda y: torch.ones_like(y[..., :1]).transpose(1, 2) @ y,
])  # fmt: skip
def test_a_total_over_positions_is_no_constant(total):
    def forward(m, x):
        x = m.stem(x)
        return m.head(x + total(m.outer(m.inner(x).relu())))

    gated, slim, _ = without(linear_net(forward), values(2, 6, 5), "inner")
    agree(gated, slim, values(2, 6, 5), values(2, 9, 5), values(1, 1, 5))


def test_a_padded_convolution_of_a_single_position_is_no_constant():
    net = Net(residual, stem=conv(3, 4), inner=conv(4, 5), outer=conv(5, 4, 3), head=conv(4, 2))
    net.outer = nn.Sequential(conv(5, 6), conv(6, 4, 3))
    gated, slim, _ = without(net, values(2, 3, 1, 1), "inner")
    agree(gated, slim, values(2, 3, 1, 1), values(2, 3, 4, 4))
