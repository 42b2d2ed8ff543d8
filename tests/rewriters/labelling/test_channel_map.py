"""The channel map: members, groups, graph, kept channels, costs of kernels."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import nn

from benchmarks.parts import PRODUCTS_WITH_KERNELS, recorded_flops
from rewriters.analysis.analyse import analyse
from rewriters.labelling.channel_map import ALWAYS, Side, distinct, gather
from tests.rewriters.exactness import random_live, slim
from tests.rewriters.helpers import Net, conv, image
from tests.rewriters.random_networks import build, random_recipe


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3, 4, 3), conv(4, 6, 3, bias=False), conv(6, 4, 3)
        self.bn, self.dw, self.fc = nn.BatchNorm2d(6), conv(4, 4, 3, groups=4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.bn(self.a(x)).relu())
        return self.fc(self.dw(x).mean((2, 3)))


@pytest.fixture
def channel_map():
    return analyse(Residual().eval(), (torch.randn(1, 3, 8, 8),)).channel_map


def test_a_class_is_where_its_indices_are(channel_map):
    members = [channel_map.where(label) for label in range(channel_map.size)]
    assert len(members) == 10
    stage = {side.tensor for side, _ in members[0]}
    assert stage == {"stem.weight", "stem.bias", "a.weight", "b.weight", "b.bias", "dw.weight", "dw.bias", "fc.weight"}
    for label, places in enumerate(members):
        for side, index in places:
            assert channel_map.classes[side][index] == label


def test_groups_are_the_widths_of_the_network(channel_map):
    groups = channel_map.groups()
    assert sorted(len(group.classes) for group in groups) == [4, 6]
    inner = next(group for group in groups if len(group.classes) == 6)
    assert {str(side) for side in inner.sides} == {
        "a.weight[0]", "bn.weight[0]", "bn.bias[0]", "bn.running_mean[0]", "bn.running_var[0]", "b.weight[1]",
    }  # fmt: skip


def test_classes_are_gathered_by_where_they_lie_and_how_often():
    generator = np.random.default_rng(0)
    ends = [generator.integers(ALWAYS, 30, length) for length in (0, 5, 20, 40, 40, 80)] + [np.arange(12, 20)]
    number, places = gather(30, ends)
    plain = [
        tuple((end, count) for end, on in enumerate(ends) if (count := np.count_nonzero(on == label)))
        for label in range(30)
    ]
    assert [places[kind] for kind in number] == plain
    assert list(dict.fromkeys(plain)) == places
    assert [kind for kind, _ in itertools.groupby(sorted(number))] == list(range(len(places)))


@pytest.mark.parametrize("side", [[], [ALWAYS], [ALWAYS, 0, 2], [0, 1], [ALWAYS, ALWAYS, 1], [2, ALWAYS, 0, 2]])
def test_distinct_classes_come_in_order_and_without_what_always_stays(side):
    there = sorted(set(side) - {ALWAYS})
    members, counts = distinct(np.array(side, np.int64))
    assert (members.tolist(), counts.tolist()) == (there, [side.count(label) for label in there])


def test_graph_joins_groups_and_kernels(channel_map):
    graph = channel_map.graph()
    kernels = {node[1] for node in graph if node[0] == "kernel"}
    assert kernels == {"stem", "a", "b", "dw", "fc"}
    stage = next(node for node, data in graph.nodes(data=True) if data.get("width") == 4)
    ends = {neighbour[1]: graph.edges[stage, neighbour]["end"] for neighbour in graph[stage]}
    assert ends["stem"] == "output"
    assert ends["a"] == ends["fc"] == "input"
    assert sum(data["width"] for _, data in graph.nodes(data=True) if "width" in data) == channel_map.size


def test_kept_indices_are_those_of_live_classes_and_pinned_ones(channel_map):
    live = torch.tensor([True] * 4 + [False, True, False, True, False, False])
    assert channel_map.kept(Side("b.weight", 1), live).tolist() == [1, 3]
    assert channel_map.kept(Side("b.weight", 0), live).tolist() == [0, 1, 2, 3]
    assert Side("fc.weight", 0) not in channel_map.classes


def test_cuts_are_what_is_kept_of_each_side_that_loses_indices(channel_map):
    live = torch.arange(channel_map.size) % 3 > 0
    kept = {side: channel_map.kept(side, live) for side in channel_map.classes}
    cuts = channel_map.cuts(live)
    assert cuts.keys() == {side for side, indices in kept.items() if len(indices) < len(channel_map.classes[side])}
    assert cuts and all(torch.equal(cuts[side], kept[side]) for side in cuts)


def test_sides_with_the_same_classes_share_one_tensor(channel_map):
    assert channel_map.classes[Side("a.weight", 0)] is channel_map.classes[Side("bn.running_mean", 0)]
    assert channel_map.classes[Side("a.weight", 0)] is not channel_map.classes[Side("stem.weight", 0)]


def test_gates_stand_where_channels_are_summed(channel_map):
    assert {str(side) for side in channel_map.gated} == {"a.weight[1]", "b.weight[1]", "fc.weight[1]"}
    kernels = {kernel.module: kernel for kernel in channel_map.kernels}
    assert not kernels["dw"].mixes
    assert kernels["fc"].input_side == Side("fc.weight", 1)
    assert kernels["fc"].output_side == Side("fc.weight", 0)


def test_every_pin_says_where_and_why(channel_map):
    assert all(pin.op and pin.reason and pin.sides for pin in channel_map.pins)
    pinned = {side for pin in channel_map.pins for side in pin.sides}
    for side in channel_map.sizes:
        if channel_map.sizes[side] > 1 and (side not in channel_map.classes or ALWAYS in channel_map.classes[side]):
            assert side in pinned


def test_moving_a_map_moves_its_indices(channel_map):
    moved = channel_map.to("meta")
    assert all(labels.device.type == "meta" for labels in moved.classes.values())
    assert moved.size == channel_map.size


def counted(model, args, kwargs):
    """Multiply-adds of convolutions and linear layers as fvcore counts them."""
    counts = FlopCountAnalysis(model, args).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = counts.by_operator()
    return by_operator["conv"] + by_operator["linear"] + by_operator["addmm"]


def modelled(channel_map, live):
    """The same from the kernels' own costs and the live channels."""
    return sum(channel_map.macs(kernel, live) for kernel in channel_map.kernels)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_kernels_cost_what_fvcore_counts(share):
    args = (torch.randn(1, 3, 8, 8),)
    slimmed = slim(Residual().eval(), args, share=share, seed=3)
    found = slimmed.analysis.channel_map
    assert modelled(found, slimmed.plan.live) == counted(slimmed.model, args, {})


def test_costs_are_for_one_sample():
    one, four = (analyse(Residual().eval(), (torch.randn(batch, 3, 8, 8),)).channel_map for batch in (1, 4))
    assert [kernel.macs for kernel in one.kernels] == [kernel.macs for kernel in four.kernels]


def tokens(m: Net, x: torch.Tensor) -> torch.Tensor:
    """A mixer's layers across tokens: once for each channel."""
    return m.out(m.wide(m.a(x).flatten(2)).relu().matmul(m.narrow.weight.t()).mean(2))


def by_head(m: Net, x: torch.Tensor) -> torch.Tensor:
    """A layer that reads what is in a head: once for each head."""
    rows = m.a(x).flatten(2).transpose(1, 2).unflatten(2, (3, 2)).transpose(1, 2)
    found = (rows @ rows.transpose(2, 3)).softmax(-1) @ rows
    return m.out((found * m.head(found).sigmoid()).transpose(1, 2).flatten(2).mean(1))


def by_image(m: Net, x: torch.Tensor) -> torch.Tensor:
    """A convolution that takes each channel for an image of its own."""
    x = m.a(x)
    return m.out(m.one(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2]).mean((2, 3, 4)))


REPEATED = {
    "tokens": (tokens, {"wide": nn.Linear(64, 8), "narrow": nn.Linear(8, 4), "out": nn.Linear(6, 2)}),
    "heads": (by_head, {"head": nn.Linear(2, 1), "out": nn.Linear(6, 2)}),
    "images": (by_image, {"one": conv(1, 3, 3), "out": nn.Linear(6, 2)}),
    "several": (
        lambda m, x: m.out(m.wide(m.a(x).flatten(2)).mean(2)) + m.other(m.wide(m.b(x).flatten(2)).mean(2)),
        {"wide": nn.Linear(64, 8), "out": nn.Linear(6, 2), "b": conv(3, 5), "other": nn.Linear(5, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", REPEATED)
def test_a_layer_that_runs_for_each_channel_of_others_costs_by_how_many_are_left(name, batch):
    forward, layers = REPEATED[name]
    x = torch.randn(batch, 3, 8, 8)
    model = Net(forward, a=conv(3, 6), **copy.deepcopy(layers)).eval()
    dense = recorded_flops(model, ((x,), {}), of=PRODUCTS_WITH_KERNELS)
    slimmed = slim(model, (x,), share=0.5, seed=2)
    found, everything = slimmed.analysis.channel_map, torch.ones(slimmed.analysis.channel_map.size, dtype=torch.bool)
    assert modelled(found, everything) == dense
    left = recorded_flops(slimmed.model, ((x,), {}), of=PRODUCTS_WITH_KERNELS)
    cost = modelled(found, slimmed.plan.live)
    assert left < cost if name == "several" else left == cost


@pytest.mark.parametrize("name", REPEATED)
def test_what_a_layer_runs_for_does_not_hang_on_the_batch(name):
    forward, layers = REPEATED[name]
    model = Net(forward, a=conv(3, 6), **copy.deepcopy(layers)).eval()
    one, three = (analyse(model, (torch.randn(batch, 3, 8, 8),)).channel_map for batch in (1, 3))
    assert one.kernels == three.kernels
    if name != "several":
        assert any(kernel.repeats for kernel in one.kernels) and all(map(one.reached, one.kernels))


def test_what_runs_in_train_mode_too_is_counted_once():
    """An auxiliary head makes a second recording, in train mode: the layer across tokens is in both."""
    inner = Net(tokens, a=conv(3, 6), **copy.deepcopy(REPEATED["tokens"][1])).eval()
    x = torch.randn(2, 3, 8, 8)
    alone = analyse(inner, (x,)).channel_map.kernels
    forward = lambda m, x: m.aux(m.inner(x)) if m.training else m.inner(x)  # noqa: E731
    *both, aux = analyse(Net(forward, inner=inner, aux=nn.Linear(2, 2)).eval(), (x,)).channel_map.kernels
    assert aux.weight == "aux.weight" and aux.macs == 0
    assert [(kernel.macs, kernel.repeats) for kernel in both] == [(kernel.macs, kernel.repeats) for kernel in alone]
    assert any(kernel.repeats for kernel in both)


PLAIN = ("Plain", "Residual", "Depthwise", "Grouped", "CrossStage", "Res2", "Dense", "Ghost", "Transposed", "Shared")


@pytest.mark.parametrize("name", PLAIN)
def test_costs_of_random_blocks_are_what_fvcore_counts(name):
    recipe = random_recipe(0)
    recipe = type(recipe)("image", 5, ((name, 4),), "pool")
    network = build(recipe)
    args = tuple(arg[:1] for arg in network.args)
    analysis = analyse(network.model, args)
    everything = torch.ones(analysis.channel_map.size, dtype=torch.bool)
    assert modelled(analysis.channel_map, everything) == counted(network.model, args, {})
    live = random_live(analysis.channel_map.size, 0.5, 1)
    slimmed = slim(network.model, args, share=0.5, seed=1, analysis=analysis)
    if torch.equal(slimmed.plan.live, live) and not slimmed.plan.removed:
        assert modelled(analysis.channel_map, live) == counted(slimmed.model, args, {})


def test_matrix_products_with_flattened_and_with_sliced_kernels_are_counted():
    """A patch embedding as a matrix product, and a kernel used in two halves."""

    def forward(net, x):
        patches = F.linear(net.stem(x).flatten(1), net.patch.flatten(1)).relu()
        return net.head(F.linear(patches, net.halves[:5]) * F.linear(patches, net.halves[5:]))

    torch.manual_seed(0)
    model = Net(
        forward, stem=conv(3, 8), patch=nn.Parameter(torch.randn(12, 8, 4, 4)),
        halves=nn.Parameter(torch.randn(10, 12)), head=nn.Linear(5, 2),
    ).eval()  # fmt: skip
    inputs = ((image(),), {})
    dense = recorded_flops(model, inputs, of=PRODUCTS_WITH_KERNELS)
    slimmed = slim(model, (image(),))
    found = slimmed.analysis.channel_map
    assert modelled(found, torch.ones(found.size, dtype=torch.bool)) == pytest.approx(dense, rel=1e-12)
    left = recorded_flops(model, inputs, of=PRODUCTS_WITH_KERNELS)
    assert modelled(found, slimmed.plan.live) == pytest.approx(left, rel=1e-12)
    assert left < dense
