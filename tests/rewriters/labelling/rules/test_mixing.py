"""Reductions, softmax, pooling and norms: the channels that they keep or pin."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis.analyse import analyse
from tests.rewriters.exactness import assert_exact, slim
from tests.rewriters.helpers import Net, classes, conv, image, is_pinned, mapped, reasons


def between(op, **members):
    """A map of two convolutions with something between them."""
    return mapped(lambda m, x: m.b(op(m, m.a(x))), a=conv(3, 4), b=conv(4, 2), **members)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.softmax(1) * x, lambda x: F.log_softmax(x, 1), lambda x: x.cumsum(1), lambda x: x.sort(1)[0],
        lambda x: x * x.max(1, keepdim=True)[1],
        lambda x: x.argsort(1).float() + x, lambda x: F.local_response_norm(x, 3),
        lambda x: x * x.logsumexp(1, keepdim=True),
        lambda x: x / torch.linalg.vector_norm(x, -1, dim=1, keepdim=True), lambda x: x.topk(4, 1).values,
        lambda x: x.cumprod(1), lambda x: x.cummax(1).values, lambda x: x.logcumsumexp(1),
        lambda x: x.cumsum_(1), lambda x: x - x.median(1, keepdim=True).values, lambda x: x - x.median(),
        lambda x: x * x.kthvalue(2, 1, keepdim=True).values, lambda x: x * x.mode(1, keepdim=True).values,
        lambda x: x * torch.aminmax(x, dim=1, keepdim=True).max, lambda x: x.movedim(1, -1).tril().movedim(-1, 1),
        lambda x: x.movedim(1, -2).triu_().movedim(-2, 1),
    ],
)  # fmt: skip
def test_mixing_along_channels_pins(op):
    found = between(lambda m, y: op(y))
    assert is_pinned(found, "a.weight", 0)
    assert reasons(found, "a.weight", 0)


def test_softmax_over_channels_pins_and_says_so():
    found = between(lambda m, y: y.softmax(1))
    assert reasons(found, "a.weight", 0) == ["aten._softmax.default: mixed along its channels"]


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.mean((2, 3), keepdim=True), lambda x: x - x.amax((2, 3), keepdim=True),
        lambda x: x.flatten(2).softmax(-1).view(x.shape), lambda x: x.sum(0, keepdim=True),
        lambda x: x.var((2, 3), keepdim=True), lambda x: x.mean(3).mean(2)[..., None, None],
        lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, 2), lambda x: F.lp_pool2d(x, 2, 2),
        lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=7, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
        lambda x: F.pad(x, (1, 1, 1, 1)), lambda x: F.instance_norm(x), lambda x: x.max(2, keepdim=True)[0],
        lambda x: x / torch.std_mean(x, (2, 3), keepdim=True)[0], lambda x: x.rot90(1, (2, 3)),
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), lambda x: x.topk(2).values,
        lambda x: x.cumprod(-1), lambda x: x.cummin(2).values, lambda x: x.logcumsumexp(3), lambda x: x.cumsum_(2),
        lambda x: x - x.median(-1, keepdim=True).values, lambda x: x - x.nanmedian(2, keepdim=True)[0],
        lambda x: x.kthvalue(2).values[..., None], lambda x: x.mode().values[..., None],
        lambda x: x.nansum((2, 3), keepdim=True), lambda x: x.nanmean((2, 3), keepdim=True),
        lambda x: torch.aminmax(x, dim=2, keepdim=True).min, lambda x: x * x.count_nonzero((2, 3))[..., None, None],
        lambda x: x.tril(), lambda x: x.triu_(1), lambda x: x.sort(dim=-1, stable=True).values,
    ],
)  # fmt: skip
def test_mixing_along_positions_passes_channels(op):
    found = between(lambda m, y: op(y))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == [0, 1, 2, 3]


def test_softmax_over_branches_passes_channels():
    def select(m, x):
        branches = torch.stack([m.a(x), m.c(x)], 1)
        return m.b((branches * branches.mean((3, 4), keepdim=True).softmax(1)).sum(1))

    found = mapped(select, a=conv(3, 4), c=conv(3, 4), b=conv(4, 2))
    assert classes(found, "a.weight", 0) == classes(found, "c.weight", 0) == [0, 1, 2, 3]


def test_batch_norm_rides_along():
    found = between(lambda m, y: m.bn(y), bn=nn.BatchNorm2d(4))
    for name in ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        assert classes(found, name, 0) == classes(found, "a.weight", 0) == [0, 1, 2, 3]


def test_instance_norm_rides_along():
    found = between(lambda m, y: m.norm(y), norm=nn.InstanceNorm2d(4, affine=True))
    assert classes(found, "norm.weight", 0) == classes(found, "a.weight", 0) == [0, 1, 2, 3]


STATISTICS = [
    lambda x: F.normalize(x, dim=1), lambda x: x - x.mean(1, keepdim=True), lambda x: x - x.mean(),
    lambda x: x / x.norm(dim=1, keepdim=True), lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True),
    lambda x: x * x.std(1, keepdim=True), lambda x: x / torch.var(x, (1, 2), keepdim=True),
    lambda x: x - torch.var_mean(x, 1, keepdim=True)[1], lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: x / torch.std_mean(x, 1, keepdim=True)[0], lambda x: x * x.max(1, keepdim=True)[0],
    lambda x: x - torch.min(x, dim=1, keepdim=True).values,
]  # fmt: skip


@pytest.mark.parametrize("op", STATISTICS)
def test_statistics_along_channels_let_them_die(op):
    found = between(lambda m, y: op(y))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == [0, 1, 2, 3]
    assert [statistic.classes.tolist() for statistic in found.statistics] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("op", STATISTICS)
def test_statistics_along_channels_pin_where_embeddings_stay(op):
    model = Net(lambda m, x: m.b(op(m.a(x))), a=conv(3, 4), b=conv(4, 2))
    found = analyse(model.eval(), (image(),), embed=False).channel_map
    assert is_pinned(found, "a.weight", 0)
    assert reasons(found, "a.weight", 0)


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 4), nn.LayerNorm([4, 4, 4])])
def test_norms_across_channels_ride_along(norm):
    found = between(lambda m, y: m.norm(y), norm=norm)
    assert classes(found, "a.weight", 0) == classes(found, "norm.weight", 0) == classes(found, "norm.bias", 0)
    assert classes(found, "a.weight", 0) == found.statistics[0].classes.tolist() == [0, 1, 2, 3]
    assert is_pinned(found, "norm.weight", 1)  # rows, columns: no layer owns them


def test_group_norm_lets_whole_groups_die_or_the_same_places_of_each():
    wide = mapped(lambda m, x: m.b(m.norm(m.a(x))), a=conv(3, 8), norm=nn.GroupNorm(2, 8), b=conv(8, 2))
    assert classes(wide, "a.weight", 0) == classes(wide, "norm.weight", 0) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert wide.statistics[0].classes.tolist() == [0, 1, 2, 3]
    narrow = mapped(lambda m, x: m.b(m.norm(m.a(x))), a=conv(3, 8), norm=nn.GroupNorm(4, 8), b=conv(8, 2))
    assert classes(narrow, "a.weight", 0) == classes(narrow, "norm.bias", 0) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not narrow.statistics


def test_a_statistic_along_channels_in_two_dimensions_pins_them():
    def outer(m, x):
        y = m.a(x).mean((2, 3))[:, :, None] @ m.c(x).mean((2, 3))[:, None]
        return m.b((y / y.mean((1, 2), keepdim=True))[..., None])

    found = mapped(outer, a=conv(3, 4), c=conv(3, 5), b=conv(4, 2))
    assert is_pinned(found, "a.weight", 0)
    assert is_pinned(found, "c.weight", 0)


def test_maxout_lets_pairs_die():
    def maxout(m, x):
        return m.b(m.a(x).view(x.shape[0], 4, 2, *x.shape[2:]).max(2).values)

    found = mapped(maxout, a=conv(3, 8), b=conv(4, 2))
    assert classes(found, "a.weight", 0) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_channels_go_through_fourier_transforms():
    def filtered(m, x):
        y = torch.fft.rfft2(m.a(x), norm="ortho") * torch.view_as_complex(m.filter)
        return m.b(torch.fft.irfft2(y, s=x.shape[2:], norm="ortho"))

    model = Net(filtered, a=conv(3, 6), b=conv(6, 2), filter=nn.Parameter(torch.randn(6, 4, 3, 2)))
    assert assert_exact(model.double(), (image().double(),)).analysis.channel_map.size == 6

    def convolved(m, x):
        y = torch.fft.fft2(m.a(x))
        parts = m.between(torch.cat([y.real, y.imag], 1)).relu()
        y = torch.complex(*parts.chunk(2, 1))
        return m.b(torch.fft.ifft2(y).real)

    model = Net(convolved, a=conv(3, 6), between=conv(12, 8), b=conv(4, 2))
    assert assert_exact(model.double(), (image().double(),)).analysis.channel_map.size == 6 + 4


def test_fourier_transforms_along_channels_pin():
    found = between(lambda m, y: torch.fft.fft(y, dim=1).real)
    assert reasons(found, "a.weight", 0) == ["aten._fft_r2c.default: transformed along its channels"]


def test_the_parts_of_complex_numbers_stay():
    def one_number(m, x):
        return m.b(torch.view_as_complex(m.a(x).movedim(1, -1).contiguous()).abs()[:, None])

    found = mapped(one_number, image(), a=conv(3, 2), b=conv(1, 2))
    assert "aten.view_as_complex.default: the parts of a complex number" in reasons(found, "a.weight", 0)


def test_reductions_over_everything_are_exact():
    model = Net(lambda m, x: m.b(m.a(x)).mean() + m.a(x).sum((2, 3)).amax(1), a=conv(3, 4), b=conv(4, 2))
    assert_exact(model.double().eval(), (image().double(),))


def test_windows_of_a_channel_are_cut_out_and_added_up_together():
    """A convolution whose kernel each pixel computes for itself (involution)."""

    def involution(m, x):
        y = m.a(x)
        kernel = m.kernel(x).flatten(2)[:, None]
        windows = F.unfold(y, 3, padding=1).view(len(y), y.shape[1], 9, -1)
        return m.b((windows * kernel).sum(2).view(y.shape))

    model = Net(involution, a=conv(3, 8), kernel=conv(3, 9), b=conv(8, 2))
    assert assert_exact(model.double(), (image().double(),)).analysis.channel_map.size == 8

    def added_up(m, x):
        return m.b(F.fold(F.unfold(m.a(x), 2, stride=2), (4, 4), 2, stride=2) + F.fold(m.c(x.flatten(2)), (4, 4), 1))

    model = Net(added_up, a=conv(3, 8), c=nn.Conv1d(3, 8, 1), b=conv(8, 2))
    assert assert_exact(model.double(), (image().double(),)).analysis.channel_map.size == 8


def test_what_is_added_up_in_one_channel_goes_together():
    found = mapped(lambda m, x: m.b(F.fold(m.a(x.flatten(2)), (8, 8), 2, stride=2)), a=nn.Conv1d(3, 8, 1), b=conv(2, 2))
    assert classes(found, "a.weight", 0) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_pooled_values_go_back_to_the_places_that_other_channels_had():
    """SegNet's: the encoder's channels and the decoder's meet in the places."""

    def forward(m, x):
        pooled, places = F.max_pool2d(m.a(x), 2, return_indices=True)
        return m.c(F.max_unpool2d(m.b(pooled), places, 2))

    members = {"a": conv(3, 6), "b": conv(6, 6), "c": conv(6, 2)}
    found = mapped(forward, **members)
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) == classes(found, "c.weight", 1)
    assert_exact(Net(forward, **members).double(), (image().double(),))


def test_volumes_are_unpooled():
    layer = nn.MaxUnpool3d(2)

    def forward(m, x):
        return m.b(layer(*F.max_pool3d(m.a(x), 2, return_indices=True)))

    model = Net(forward, a=nn.Conv3d(3, 6, 1), b=nn.Conv3d(6, 2, 1)).double()
    assert assert_exact(model, (torch.randn(2, 3, 4, 4, 4).double(),)).analysis.channel_map.size == 6


@pytest.mark.filterwarnings("error")
def test_an_instance_norm_without_parameters_is_told_its_width():
    """PyTorch warns of every call for another."""
    model = nn.Sequential(conv(3, 6), nn.InstanceNorm2d(6), nn.InstanceNorm2d(6), conv(6, 2)).double()
    undone = assert_exact(model, (image().double(),)).model
    assert undone[1].num_features == undone[2].num_features == 6
    slimmed = slim(model, (image().double(),), share=0.6, seed=1).model
    assert slimmed[1].num_features == slimmed[2].num_features == slimmed[0].out_channels < 6


@pytest.mark.parametrize(("op", "pinned"), [
    (lambda x: F.max_pool2d(x, (3, 1), 1), False), (lambda x: F.avg_pool2d(x, (2, 1)), False),
    (lambda x: F.max_pool2d(x, (3, 1), (1, 2)).repeat(1, 1, 1, 2), True), (lambda x: F.avg_pool2d(x, 3, 1, 1), True),
    (lambda x: x[..., :2, :] * F.max_pool2d(x, (3, 1), 1, return_indices=True)[1], True),
])  # fmt: skip
def test_pooling_passes_channels_that_it_takes_one_by_one(op, pinned):
    found = between(lambda m, y: op(y.movedim(1, -1)).movedim(-1, 1))
    assert is_pinned(found, "a.weight", 0) == pinned
