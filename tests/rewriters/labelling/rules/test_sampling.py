"""Sampling at computed positions: channels of the sampled tensor can be removed, those of the positions stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import library, nn
from torchvision import ops

from rewriters.labelling.rules.registry import find_rule, rule, unknown
from tests.rewriters.exactness import assert_exact
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned


def test_channels_of_maps_on_a_grid_go_and_the_grid_stays():
    """Its two coordinates are channels of a convolution here, and looked at by another."""

    def forward(m, x):
        y = m.a(x)
        offsets = m.offsets(y)
        return m.b(F.grid_sample(y, offsets.permute(0, 2, 3, 1), align_corners=False)) + m.c(offsets)

    model = Net(forward, a=conv(3, 6), offsets=conv(6, 2), b=conv(6, 2), c=conv(2, 2)).double()
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 6
    assert is_pinned(slimmed.analysis.channel_map, "offsets.weight", 0)


def test_an_affine_map_keeps_its_numbers():
    """A spatial transformer (Jaderberg et al., section 3.2)."""

    def forward(m, x):
        y = m.a(x)
        theta = m.theta(y.mean((2, 3))).view(-1, 2, 3)
        return m.b(F.grid_sample(y, F.affine_grid(theta, y.size(), align_corners=False), align_corners=False))

    net = Net(forward, a=conv(3, 8), theta=nn.Linear(8, 6), b=conv(8, 2)).double()
    channel_map = assert_exact(net, (image().double(),)).analysis.channel_map
    assert classes(channel_map, "a.weight", 0) == classes(channel_map, "theta.weight", 1) == [*range(8)]
    assert is_pinned(channel_map, "theta.weight", 0)


def test_volumes_are_sampled_too():
    grid = torch.rand(2, 2, 2, 2, 3).double()
    model = Net(
        lambda m, x: m.b(F.grid_sample(m.a(x), grid, align_corners=True)), a=nn.Conv3d(3, 6, 1), b=nn.Conv3d(6, 2, 1)
    ).double()
    slimmed = assert_exact(model, (torch.randn(2, 3, 4, 4, 4).double(),))
    assert slimmed.analysis.channel_map.size == 6


def test_heads_in_the_batch_go_with_their_positions():
    """Deformable attention: each head samples its own values where its own offsets say."""

    def forward(m, x):
        b, _, h, w = x.shape
        values = m.values(x).reshape(b * 4, 3, h, w)
        offsets = m.offsets(x).reshape(b * 4, 2, h, w).permute(0, 2, 3, 1)
        weights = m.weights(x).sigmoid().reshape(b * 4, 1, h, w)
        sampled = F.grid_sample(values, offsets, align_corners=False) * weights
        return m.out(sampled.reshape(b, 12, h, w))

    model = Net(
        forward, values=conv(3, 12), offsets=conv(3, 8), weights=conv(3, 4), out=conv(12, 2)
    ).double()  # fmt: skip
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 4
    assert not is_pinned(slimmed.analysis.channel_map, "offsets.weight", 0)


def deformable(masked: bool = True, offset_groups: int = 1, **options) -> nn.Module:
    """A deformable convolution of 8 channels to 12 whose offsets and mask are computed from what it is given."""

    def forward(m, x):
        y = m.stem(x).relu()
        mask = (m.mask(y).sigmoid(),) if masked else ()
        return m.head(m.bn(m.deformable(y, m.offset(y), *mask)).relu())

    torch.manual_seed(0)
    of_mask = {"mask": conv(8, 9 * offset_groups)} if masked else {}
    return Net(
        forward, stem=conv(3, 8, 3), offset=conv(8, 18 * offset_groups), **of_mask,
        deformable=ops.DeformConv2d(8, 12, 3, **{"padding": 1, **options}), bn=nn.BatchNorm2d(12), head=conv(12, 2),
    ).double()  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"bias": False, "masked": False}, {"padding": 2, "dilation": 2}], ids=str)
def test_deformable_convolution_loses_inputs_and_outputs(options):
    slimmed = assert_exact(deformable(**options), (image(size=9).double(),))
    assert slimmed.analysis.channel_map.size == 8 + 12
    layer, weight = slimmed.model.deformable, slimmed.model.deformable.weight
    assert (layer.out_channels, layer.in_channels) == tuple(weight.shape[:2])
    assert slimmed.model.offset.out_channels == 18 and not slimmed.plan.forwards.keys() - {"deformable"}


@pytest.mark.parametrize(
    ("groups", "offset_groups", "classes"),
    [(1, 2, 4 + 12), (1, 8, 1 + 12), (2, 1, 4 + 6), (4, 1, 4), (2, 2, 4 + 6), (4, 2, 2)],
)
def test_channels_go_at_the_same_place_in_every_group_of_offsets(groups, offset_groups, classes):
    slimmed = assert_exact(deformable(groups=groups, offset_groups=offset_groups), (image(size=9).double(),))
    assert slimmed.analysis.channel_map.size == classes
    layer = slimmed.model.deformable
    assert layer.in_channels // layer.groups == layer.weight.shape[1]


def test_a_kernel_that_is_left_without_inputs_goes():
    def forward(m, x):
        y = m.b(x)
        return m.head(m.deformable(m.a(x), m.offset(y)) + y)

    model = Net(
        forward, a=conv(3, 4), b=conv(3, 6), offset=conv(6, 18), head=conv(6, 2),
        deformable=ops.DeformConv2d(4, 6, 3, padding=1, bias=False),
    ).double()  # fmt: skip
    assert "deformable" in assert_exact(model, (image().double(),)).plan.removed


@pytest.mark.parametrize("layer", [ops.RoIAlign((2, 2), 1.0, 2), ops.RoIPool((2, 2), 1.0)], ids=str)
def test_channels_come_out_of_boxes_as_they_go_in(layer):
    boxes = torch.tensor([[0, 0, 0, 3, 3], [1, 1, 1, 3, 2]]).double()
    model = Net(lambda m, x, boxes: m.b(m.cut(m.a(x), boxes)), a=conv(3, 6), cut=layer, b=conv(6, 2)).double()
    slimmed = assert_exact(model, (image().double(), boxes))
    assert slimmed.analysis.channel_map.size == 6


def test_boxes_that_were_computed_keep_their_numbers():
    """Another layer looks at them, so that gates could close."""

    def forward(m, x):
        boxes = m.boxes(x.mean((2, 3))).abs()
        return m.b(m.cut(m.a(x), boxes)), m.c(boxes)

    model = Net(
        forward, a=conv(3, 6), b=conv(6, 2), c=nn.Linear(5, 2), cut=ops.RoIAlign((2, 2), 1.0, 2),
        boxes=nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5)),
    ).double()  # fmt: skip
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 6 + 7
    assert is_pinned(slimmed.analysis.channel_map, "boxes.1.weight", 0)


def test_offsets_and_masks_keep_their_numbers():
    def forward(m, x):
        y = m.stem(x)
        offset, mask = m.offset(y), m.mask(y)
        return m.head(m.deformable(y, offset, mask)), m.look(torch.cat([offset, mask], 1))

    model = Net(
        forward, stem=conv(3, 8), offset=conv(8, 18), mask=conv(8, 9), look=conv(27, 2), head=conv(12, 2),
        deformable=ops.DeformConv2d(8, 12, 3, padding=1),
    ).double()  # fmt: skip
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 8 + 12


def test_a_rule_may_be_there_before_the_library_that_brings_the_op():
    @rule("autogate_tests.late", "autogate_tests.one.default")
    def passed_on(call):
        return call.args[0]

    later = library.Library("autogate_tests", "DEF")
    for name in ("late", "one", "other"):
        later.define(f"{name}(Tensor x) -> Tensor")
    namespace = torch.ops.autogate_tests
    assert find_rule(namespace.late.default) is find_rule(namespace.one.default) is passed_on
    assert find_rule(namespace.other.default) is unknown
