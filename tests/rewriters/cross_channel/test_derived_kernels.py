"""Kernels computed from a parameter in the forward: standardised, normalised, scaled."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from rewriters.labelling.channel_map import Side
from rewriters.outputs import run_eval
from tests.rewriters.exactness import assert_exact, slim
from tests.rewriters.helpers import Net, analysed, conv, image, is_pinned, mapped, reasons


class Standardised(nn.Conv2d):
    """As NF-Nets have it: one call of batch_norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def kernel(self):
        flat = self.weight.reshape(1, self.out_channels, -1)
        scaled = F.batch_norm(flat, None, None, weight=(self.gain * 0.7).view(-1), training=True, momentum=0.0)
        return scaled.reshape_as(self.weight)

    def forward(self, x):
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class WrittenOut(Standardised):
    """As BiT's own code has it."""

    def kernel(self):
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return (self.weight - mean) / torch.sqrt(variance + 1e-10)


class ByDeviation(Standardised):
    """As timm's older code has it."""

    def kernel(self):
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return (self.weight - mean) / (deviation + 1e-5)


class WithoutMean(Standardised):
    def kernel(self):
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)


class UnitNorm(Standardised):
    def kernel(self):
        return self.gain * F.normalize(self.weight, dim=(1, 2, 3))


class Scaled(Standardised):
    """As equalised learning rates have it."""

    def kernel(self):
        return self.weight * 0.3


class Squashed(Standardised):
    def kernel(self):
        return torch.tanh(self.weight) + 0.1


def weight_normed(into, out, kernel, **options):
    return parametrizations.weight_norm(conv(into, out, kernel, **options))


def old_weight_normed(into, out, kernel, **options):
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(conv(into, out, kernel, **options))


def standardised(kind):
    return lambda into, out, kernel, **options: kind(into, out, kernel, padding=kernel // 2, **options)


KINDS = {
    kind.__name__: standardised(kind)
    for kind in (Standardised, WrittenOut, ByDeviation, WithoutMean, UnitNorm, Scaled, Squashed)
}
KINDS |= {"weight_norm": weight_normed, "old weight_norm": old_weight_normed}

PARAMETERS = {"weight_norm": "parametrizations.weight.original1", "old weight_norm": "weight_v"}
"""Where the kernel's channels lie; in the others it is the weight."""


class Bottleneck(nn.Module):
    def __init__(self, make, groups=1):
        super().__init__()
        self.stem, self.head = conv(3, 12, 3), conv(12, 4)
        self.into, self.middle, self.out = make(12, 16, 1), make(16, 16, 3, groups=groups), make(16, 12, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.out(F.relu(self.middle(F.relu(self.into(x))))))


def network(name, groups=1):
    torch.manual_seed(0)
    model = Bottleneck(KINDS[name], groups).double().eval()
    run_eval(model, (image(size=6).double(),))  # the older weight norm's hook leaves a kernel that can be copied
    return model


@pytest.mark.parametrize("groups", [1, 2, 8, 16])
@pytest.mark.parametrize("name", KINDS)
def test_a_derived_kernel_loses_channels_on_both_sides_exactly(name, groups):
    slimmed = assert_exact(network(name, groups), (image(size=6).double(),))
    kernel = PARAMETERS.get(name, "weight")
    free = set(slimmed.analysis.channel_map.classes)
    assert {Side(f"{layer}.{kernel}", dim) for layer in ("into", "out") for dim in (0, 1)} <= free
    assert Side(f"middle.{kernel}", 0) in free


@pytest.mark.parametrize("name", KINDS)
def test_fields_and_forwards_of_the_slim_layer(name):
    model = slim(network(name), (image(size=6).double(),), share=0.5, seed=1).model
    assert model.middle.in_channels == model.middle.weight.shape[1] < 16
    assert model.middle.out_channels == model.middle.weight.shape[0] < 16
    assert not any("live_statistic" in path for path, _ in model.named_modules())


def test_nothing_changes_before_a_channel_dies():
    from rewriters.undo_log import UndoLog

    for name in KINDS:
        model, example = network(name), (image(size=6).double(),)
        wanted = run_eval(model, example)
        analysis = analysed_model(model, example)
        analysis.place_statistics(model, UndoLog())
        assert torch.equal(run_eval(model, example)[0], wanted[0])


def analysed_model(model, example):
    from rewriters.analysis.analyse import analyse

    return analyse(model, example)


@pytest.mark.parametrize("groups", [2, 8, 16])
@pytest.mark.parametrize("name", KINDS)
def test_fields_of_a_slim_grouped_layer(name, groups):
    middle = slim(network(name, groups), (image(size=6).double(),), share=0.5, seed=1).model.middle
    assert middle.out_channels == middle.weight.shape[0] < 16
    assert middle.in_channels == middle.weight.shape[1] * middle.groups < 16


@pytest.mark.parametrize("normed", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_keeps_its_own_channels_only(normed):
    torch.manual_seed(0)
    model = Net(
        lambda net, x: net.head(net.after(F.relu(net.middle(F.relu(net.before(F.relu(net.stem(x)))))))),
        stem=conv(3, 12), before=conv(12, 8), middle=normed(conv(8, 8, 3)), after=conv(8, 12), head=conv(12, 4),
    ).double()  # fmt: skip
    channel_map = assert_exact(model, (image(size=6).double(),)).analysis.channel_map
    for side in (Side("stem.weight", 0), Side("before.weight", 1), Side("after.weight", 0), Side("head.weight", 1)):
        assert (channel_map.classes[side] >= 0).all()
    assert Side("before.weight", 0) not in channel_map.classes
    assert Side("after.weight", 1) not in channel_map.classes


def test_a_derived_kernel_of_a_linear_layer():
    def forward(net, x):
        hidden = net.first(x.mean((2, 3)))
        kernel = net.second - net.second.mean(1, keepdim=True)
        return net.last(F.linear(hidden, kernel).relu())

    torch.manual_seed(0)
    model = Net(forward, first=nn.Linear(3, 8), second=nn.Parameter(torch.randn(8, 8)), last=nn.Linear(8, 2)).double()
    slimmed = assert_exact(model, (image().double(),))
    assert {Side("second", 0), Side("second", 1)} <= set(slimmed.analysis.channel_map.classes)


def test_a_kernel_of_ones_inputs_keeps_two():
    channel_map = analysed(
        lambda net, x: net.head(net.middle(net.stem(x))),
        stem=conv(3, 8), middle=Standardised(8, 8, 1), head=conv(8, 4),
    ).channel_map  # fmt: skip
    assert (channel_map.classes[Side("middle.weight", 1)] >= 0).sum() == 6


def test_a_kernel_mixed_with_another_keeps_its_channels():
    """Conditional convolutions: each sample's kernel is a sum of several."""

    def forward(net, x):
        x = net.stem(x)
        shares = net.route(x.mean((2, 3))).sigmoid()
        kernels = (shares @ net.experts).view(-1, 8, 1, 1)
        return net.head(F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=len(x)).view(len(x), -1, *x.shape[2:]))

    channel_map = mapped(
        forward, stem=conv(3, 8), route=nn.Linear(8, 2), experts=nn.Parameter(torch.randn(2, 64)), head=conv(8, 4)
    )
    assert is_pinned(channel_map, "stem.weight", 0)
    assert reasons(channel_map, "stem.weight", 0)


def transposed(**options):
    return nn.ConvTranspose2d(8, 6, 4, 2, **options)


NORMED_ALONG_INPUTS = {
    "transposed": lambda: parametrizations.weight_norm(transposed()),
    "transposed, by position": lambda: parametrizations.weight_norm(transposed(groups=2)),
    "convolution": lambda: parametrizations.weight_norm(conv(8, 6, 3), dim=1),
    "by position": lambda: parametrizations.weight_norm(conv(8, 6, 3, groups=2), dim=1),
    "1x1 convolution": lambda: parametrizations.weight_norm(conv(8, 6, 1), dim=1),
}


@pytest.mark.parametrize("layer", NORMED_ALONG_INPUTS.values(), ids=NORMED_ALONG_INPUTS)
def test_a_kernel_normed_along_its_inputs_keeps_them(layer):
    """Zeros in a column would be divided by their norm, and a gate before changes nothing."""
    model = Net(lambda m, x: m.last(m.b(m.a(m.first(x)))), first=conv(3, 4), a=conv(4, 8), b=layer(), last=conv(6, 2))
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert is_pinned(slimmed.analysis.channel_map, "a.weight", 0)
    reason = "weight norm along these channels divides zeros by their norm"
    assert any(reason in found for found in reasons(slimmed.analysis.channel_map, "a.weight", 0))
    assert not is_pinned(slimmed.analysis.channel_map, "first.weight", 0)
    assert all(value.isfinite().all() for value in slimmed.wanted)


@pytest.mark.parametrize("layer", [transposed, lambda: conv(8, 6, 3)])
def test_the_older_weight_norm_along_inputs_keeps_them(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(layer(), dim=0 if layer is transposed else 1)
    found = mapped(lambda m, x: m.last(m.b(m.a(x))), a=conv(3, 8), b=normed, last=conv(6, 2))
    assert is_pinned(found, "a.weight", 0)


def test_a_depthwise_transposed_kernel_with_weight_norm_loses_channels():
    layer = parametrizations.weight_norm(nn.ConvTranspose2d(8, 8, 4, 2, groups=8))
    model = Net(lambda m, x: m.last(m.b(m.a(x))), a=conv(3, 8), b=layer, last=conv(8, 2)).double().eval()
    assert not is_pinned(assert_exact(model, (image().double(),)).analysis.channel_map, "a.weight", 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_kernel_normed_at_each_position_loses_channels_on_both_sides(groups):
    """wav2vec 2.0's convolution for positions: its norm includes outputs, on which no gate stands."""
    layer = parametrizations.weight_norm(conv(8, 8, 3, groups=groups), dim=3)
    model = Net(lambda m, x: m.last(m.b(m.a(x)).relu()), a=conv(3, 8), b=layer, last=conv(8, 2)).double().eval()
    found = assert_exact(model, (image().double(),)).analysis.channel_map
    kernel = PARAMETERS["weight_norm"]
    assert {Side(f"b.{kernel}", 0), Side("a.weight", 0), Side("last.weight", 1)} <= set(found.classes)


class LoRA(nn.Linear):
    """A matrix of low rank beside a frozen one (Hu et al., section 4.1), as peft writes it."""

    def __init__(self, inputs, outputs, rank=3):
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.dropout, self.scaling = nn.Dropout(0.1), 0.5
        self.magnitude = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling


class Merged(LoRA):
    def kernel(self):
        return self.weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def forward(self, x):
        return F.linear(x, self.kernel(), self.bias)


class DoRA(Merged):
    """The sum's rows have learned norms (Liu et al., section 4.1)."""

    def kernel(self):
        kernel = super().kernel()
        return (self.magnitude / torch.linalg.norm(kernel, dim=1).detach())[:, None] * kernel


class DoRAOfPeft(LoRA):
    """Without the kernel itself."""

    def forward(self, x):
        low_rank = self.lora_B(self.lora_A(torch.eye(self.lora_A.weight.shape[1], dtype=x.dtype))).T
        norm = torch.linalg.norm(self.weight + self.scaling * low_rank.detach(), dim=1)
        scale, base = (self.magnitude / norm.detach()).view(1, -1), F.linear(x, self.weight)
        return base + self.bias + (scale - 1) * base + scale * self.lora_B(self.lora_A(x)) * self.scaling


@pytest.mark.parametrize("layer", [LoRA, Merged, DoRA, DoRAOfPeft])
def test_a_kernel_of_low_rank_beside_another(layer):
    """A gate would have to stand on a sum of two kernels where these are added, so inputs stay there."""
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), layer(12, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()
    channel_map = assert_exact(net, (torch.randn(4, 5).double(),)).analysis.channel_map
    assert not is_pinned(channel_map, "2.weight", 0) and not is_pinned(channel_map, "2.lora_A.weight", 0)
    assert is_pinned(channel_map, "2.weight", 1) == (layer is not LoRA)
