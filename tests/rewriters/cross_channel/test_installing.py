"""Cross-channel statistics are found, put on live channels, removed again, and pinned where that fails."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.cross_channel.installing import remove_live_statistics, write_live
from rewriters.labelling.channel_map import Side
from rewriters.outputs import relative_error, run_eval
from rewriters.slimming.plan import apply, plan
from rewriters.undo_log import UndoLog
from tests.rewriters.exactness import TOLERANCE, assert_exact, copies_agree, random_live, slim, zero_kernels
from tests.rewriters.helpers import Net, conv, image


class HandWritten(nn.Module):
    """Layer norm over dimension 1 as ConvNeXt's code writes it."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ResponseNorm(nn.Module):
    """Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", section 3.2."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(1, channels, 1, 1)), nn.Parameter(torch.rand(1, channels, 1, 1))

    def forward(self, x):
        g = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * (g / (g.mean(dim=1, keepdim=True) + 1e-6))) + self.beta + x


class ChannelsLast(nn.Module):
    """A norm of the last dimension, for images."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {
    "LayerNorm": lambda: ChannelsLast(nn.LayerNorm(8)),
    "LayerNorm without vectors": lambda: ChannelsLast(nn.LayerNorm(8, elementwise_affine=False)),
    "LayerNorm without bias": lambda: ChannelsLast(nn.LayerNorm(8, bias=False)),
    "RMSNorm": lambda: ChannelsLast(nn.RMSNorm(8)),
    "RMSNorm without weight": lambda: ChannelsLast(nn.RMSNorm(8, elementwise_affine=False)),
    "GroupNorm of all": lambda: nn.GroupNorm(1, 8),
    "GroupNorm of wide groups": lambda: nn.GroupNorm(2, 8),
    "GroupNorm of narrow groups": lambda: nn.GroupNorm(4, 8),
    "GroupNorm without vectors": lambda: nn.GroupNorm(4, 8, affine=False),
    "hand-written": lambda: HandWritten(8),
    "global response": lambda: ResponseNorm(8),
}
PLAIN = [name for name in NORMS if "without vectors" not in name and name != "RMSNorm without weight"]
"""Those whose fields, or whose forward, say no size that can't follow the weight's."""


class Stem(nn.Module):
    """A residual stream with a norm before each branch and at the end."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.first, self.last = conv(3, 8, 3), norm(), norm()
        self.into, self.middle, self.out, self.head = conv(8, 8), norm(), conv(8, 8), conv(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.out(self.middle(self.into(self.first(x))).relu())
        return self.head(self.last(x))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = Stem(NORMS[name]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) / 2)
    return model


@pytest.mark.parametrize("name", NORMS)
def test_norms_across_channels_are_slimmed_exactly(name):
    slimmed = assert_exact(network(name), (image().double(),))
    assert {Side("stem.weight", 0), Side("out.weight", 0), Side("into.weight", 0)} <= set(
        slimmed.analysis.channel_map.classes
    )


@pytest.mark.parametrize("name", PLAIN)
def test_a_slim_norm_runs_its_own_forward(name):
    model = slim(network(name), (image().double(),), share=0.6, seed=1).model
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any("live_statistic" in path for path, _ in model.named_modules())


def test_the_fields_of_norms_follow():
    for name, fields in (
        ("LayerNorm", ["norm.normalized_shape"]),
        ("GroupNorm of wide groups", ["num_channels", "num_groups"]),
        ("GroupNorm of narrow groups", ["num_channels", "num_groups"]),
    ):
        model = slim(network(name), (image().double(),), share=0.6, seed=1).model
        norm = model.first.get_submodule(fields[0].rpartition(".")[0])
        width = model.stem.out_channels
        assert width < 8 and norm.weight.shape == (width,)
        if isinstance(norm, nn.GroupNorm):
            assert norm.num_channels == width
            assert norm.num_groups == (2 if name == "GroupNorm of wide groups" else width // 2)
        else:
            assert norm.normalized_shape == (width,)


def test_all_is_as_before_when_statistics_are_taken_off():
    model = network("LayerNorm")
    analysis = analyse(model, (image().double(),))
    before = [dict(module.__dict__) for module in model.modules()]
    names, wanted = list(model.state_dict()), run_eval(model, (image().double(),))
    analysis.place_statistics(model, UndoLog())
    assert torch.equal(run_eval(model, (image().double(),))[0], wanted[0])
    assert list(model.state_dict()) == names
    assert any("live_statistic" in path for path, _ in model.named_modules())
    remove_live_statistics(model, UndoLog())
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_a_model_with_live_statistics_copies_and_pickles():
    model, args = network("LayerNorm"), (image().double(),)
    analysis = analyse(model, args)
    analysis.place_statistics(model, UndoLog())
    write_live(model, analysis.channel_map, random_live(analysis.channel_map.size, 0.5, 0))
    wanted = run_eval(model, args)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run_eval(twin, args)[0], wanted)
        write_live(twin, analysis.channel_map, torch.ones(analysis.channel_map.size, dtype=torch.bool))
        assert torch.equal(run_eval(model, args)[0], wanted)
        remove_live_statistics(twin, UndoLog())
        assert torch.equal(run_eval(twin, args)[0], run_eval(network("LayerNorm"), args)[0])


def test_a_model_is_analysed_as_if_its_statistics_were_plain():
    model, args = network("global response"), (image().double(),)
    first = analyse(model, args)
    first.place_statistics(model, UndoLog())
    second = analyse(model, args)
    assert first.channel_map.difference(second.channel_map) is None
    assert [one.path for one in first.channel_map.statistics] == [one.path for one in second.channel_map.statistics]
    live = random_live(first.channel_map.size, 0.5, 0)
    zero_kernels(model, first.channel_map, live)
    write_live(model, first.channel_map, live)
    wanted = run_eval(model, args)
    apply(model, plan(model, second, live, args), UndoLog())
    assert relative_error(run_eval(model, args), wanted) <= TOLERANCE


class Around(nn.Module):
    """Two convolutions with a function of the module between them."""

    def __init__(self, function, **members):
        super().__init__()
        self.first, self.last = conv(3, 8), conv(8, 4)
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def test_a_forward_that_cannot_be_traced_keeps_what_it_looks_at():
    class Norm(nn.LayerNorm):
        def forward(self, x):
            assert issubclass(type(x), torch.Tensor)  # which a proxy isn't
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    model = Around(lambda m, x: m.norm(x), norm=Norm(8))
    pins = [pin for pin in analyse(model.eval(), (image(),)).channel_map.pins if pin.module == "norm"]
    assert "normalised over its channels; " in pins[0].reason
    assert Side("first.weight", 0) in pins[0].sides


def test_a_statistic_that_no_form_is_for_keeps_what_it_looks_at():
    model = Around(lambda m, x: F.adaptive_avg_pool2d(x.movedim(1, -1), 1).movedim(1, 2) * x)
    channel_map = analyse(model.eval(), (image(),)).channel_map
    assert Side("first.weight", 0) not in channel_map.classes
    assert not channel_map.statistics
    assert any(pin.reason.endswith("; adaptive_avg_pool2d has no form for live channels") for pin in channel_map.pins)


def test_a_norm_that_runs_several_times_looks_at_the_same_channels():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(3, 8), conv(3, 8)
            self.norm, self.last = ChannelsLast(nn.LayerNorm(8, elementwise_affine=False)), conv(8, 4)

        def forward(self, x):
            return self.last(torch.cat([self.norm(self.first(x))[:, :4], self.norm(self.second(x))[:, 4:]], 1))

    torch.manual_seed(0)
    slimmed = assert_exact(Shared().double().eval(), (image().double(),))
    classes = slimmed.analysis.channel_map.classes
    assert torch.equal(classes[Side("first.weight", 0)][:4], classes[Side("second.weight", 0)][:4])


def test_a_norm_over_dead_and_living_layers_keeps_the_channel_that_a_dead_layer_keeps():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = conv(3, 4), conv(3, 5)
            self.norm, self.last = nn.GroupNorm(1, 9), conv(9, 4)

        def forward(self, x):
            return self.last(self.norm(torch.cat([self.one(x), self.other(x)], 1)))

    torch.manual_seed(0)
    model, args = Two().double().eval(), (image().double(),)
    analysis = analyse(model, args)
    live = torch.ones(9, dtype=torch.bool)
    live[:4] = False  # nothing of the first layer
    zero_kernels(model, analysis.channel_map, live)
    analysis.place_statistics(model, UndoLog())
    write_live(model, analysis.channel_map, live)
    wanted = run_eval(model, args)
    apply(model, plan(model, analysis, live, args), UndoLog())
    assert relative_error(run_eval(model, args), wanted) <= TOLERANCE


def test_the_constant_of_a_dead_branch_comes_from_live_statistics():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.into, self.out, self.head = conv(3, 8), conv(8, 6), conv(6, 8), conv(8, 4)
            self.norm = nn.GroupNorm(1, 8)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.norm(self.out(self.into(x).relu())))

    torch.manual_seed(0)
    model, args = Branch().double().eval(), (image().double(),)
    analysis = analyse(model, args)
    classes = analysis.channel_map.classes
    live = torch.ones(analysis.channel_map.size, dtype=torch.bool)
    live[classes[Side("out.weight", 1)]] = False  # the branch comes to nothing
    live[classes[Side("head.weight", 1)][:3]] = False
    zero_kernels(model, analysis.channel_map, live)
    analysis.place_statistics(model, UndoLog())
    write_live(model, analysis.channel_map, live)
    wanted = run_eval(model, args)
    slim_plan = plan(model, analysis, live, args)
    assert slim_plan.constants
    apply(model, slim_plan, UndoLog())
    assert relative_error(run_eval(model, args), wanted) <= TOLERANCE


class EfficientChannelAttention(nn.Module):
    """Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", section 3.2."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return x * y.sigmoid().view(x.shape[0], -1, 1, 1)


def with_attention() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8, 3), EfficientChannelAttention(), conv(8, 4)).double().eval()


def by_keyword(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.a(x)
    y = F.conv1d(input=x.mean((2, 3))[:, None], weight=m.kernel, padding=1)
    return m.b(x * y.transpose(1, 2)[..., None])


def test_a_convolution_along_channels_is_slimmed_exactly():
    kernel = nn.Parameter(torch.randn(1, 1, 3))
    for model in (with_attention(), Net(by_keyword, a=conv(3, 8), b=conv(8, 4), kernel=kernel).double().eval()):
        slimmed = assert_exact(model, (image().double(),))
        assert slimmed.analysis.channel_map.size == 8


def test_a_convolution_that_gives_fewer_channels_than_it_takes_keeps_them():
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        y = F.conv1d(x.mean((2, 3))[:, None], m.kernel, padding=1, stride=2).repeat_interleave(2, 2)
        return m.b(x * y.transpose(1, 2)[..., None])

    kernel = nn.Parameter(torch.randn(1, 1, 3))
    slimmed = assert_exact(Net(forward, a=conv(3, 8), b=conv(8, 4), kernel=kernel).double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 0


def test_a_slim_convolution_along_channels_knows_their_places():
    example = (image().double(),)
    slimmed = slim(with_attention(), example, share=0.6, seed=1)
    places = slimmed.model.get_buffer("1.conv.conv1d_places")
    assert places.tolist() == slimmed.plan.kept[Side("0.weight", 0)].tolist() != list(range(len(places)))
    assert copies_agree(slimmed, example, {})
    wanted = run_eval(slimmed.model, (image(batch=3).double(),))
    exported = torch.export.export(slimmed.model, (image(batch=3).double(),)).module()
    assert torch.equal(exported(image(batch=3).double()), wanted[0])


def test_what_is_left_of_a_convolution_along_channels_stays_the_second_time():
    example = (image().double(),)
    once = slim(with_attention(), example, share=0.6, seed=1)
    again = analyse(once.model, example)
    assert again.channel_map.size == 0


def test_a_convolution_along_channels_is_no_norm_of_an_embedding():
    assert analyse(with_attention(), (image().double(),), embed=False).channel_map.size == 8


class SpatialAttention(nn.Module):
    """Woo et al., "CBAM: Convolutional Block Attention Module", section 3."""

    def __init__(self):
        super().__init__()
        self.conv = conv(2, 1, 3)

    def forward(self, x):
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(dim=1, keepdim=True) - torch.amin(x, 1, keepdim=True)], 1)
        return x * self.conv(seen).sigmoid()


class WithPlaces(SpatialAttention):
    """As its authors' code has it, in which extremes come with their places."""

    def forward(self, x):
        largest, smallest = torch.max(x, 1)[0] - x.min(dim=1).values, x.min(1, keepdim=True)[0]
        seen = torch.cat((largest.unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * (self.conv(seen) - smallest).sigmoid()


@pytest.mark.parametrize("attention", [SpatialAttention, WithPlaces])
def test_extremes_over_channels_are_slimmed_exactly(attention):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8, 3), attention(), conv(8, 4)).double().eval()
    slimmed = assert_exact(model, (image().double(),))
    assert Side("0.weight", 0) in slimmed.analysis.channel_map.classes


def test_the_place_of_an_extreme_keeps_the_channels():
    model = Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 2))
    ranked = Net(lambda m, x: m.b(y := m.a(x)) * y.max(1, keepdim=True)[1], a=conv(3, 8), b=conv(8, 2))
    assert analyse(model.eval(), (image(),)).channel_map.size == 8
    assert analyse(ranked.eval(), (image(),)).channel_map.size == 0
