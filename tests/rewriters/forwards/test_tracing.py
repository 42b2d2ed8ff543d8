"""Tracing a module's forward: control flow is guarded, sizes stay expressions, signatures stay."""

from __future__ import annotations

import copy
import math
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriters.analysis.analyse import analyse
from rewriters.errors import TraceError
from rewriters.forwards.guards import ShapeGuardError
from rewriters.labelling.channel_map import Side
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, assert_exact, random_live, slim, zero_kernels
from tests.rewriters.forwards.networks import Split, rewritten, slim_and_gated, traced
from tests.rewriters.helpers import Net, conv, image


def variadic(m, *xs, **options):
    parts = [part for x in xs for part in m.a(x).chunk(2, 1)]
    return m.b(torch.cat(parts[::-1], 1)) * options.get("scale", 1.0)


def test_variable_arguments_are_followed():
    example = image().double()
    model = Net(variadic, a=conv(3, 6), b=conv(12, 2)).double().eval()
    slimmed = assert_exact(model, (example, example + 1), {"scale": 0.5})
    assert slimmed.analysis.channel_map.size == 6


def loops(m, x):
    y = m.a(x)
    total = 0
    for i in range(len(m.scales)):
        total = total + y[:, 2 * i : 2 * i + 2] * m.scales[i]
    size = tuple(int(s) for s in y.shape[2:])
    assert y.ndim == 4 and min(size) > 1
    return m.b(total if y.shape[1] % 2 == 0 else -total)


def test_loops_and_assertions_on_sizes_are_followed():
    scales = nn.ParameterList(nn.Parameter(torch.rand(1)) for _ in range(4))
    model = Net(loops, a=conv(3, 8), b=conv(2, 2), scales=scales).double().eval()
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 2


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 2)

    def forward(self, x):
        y = self.a(x)
        return self.b(y.view(len(y), 8, -1).view(len(x), *y.shape[1:])) / len(x[0])


def test_a_length_stays_an_expression():
    """Python has `__len__` give a number: the forward would have been for batches of two alone."""
    model, x = Counted(), image(batch=5)
    wanted = model(x)
    assert torch.equal(rewritten(model, image(batch=2))(x), wanted)


def test_a_loop_over_samples_is_for_as_many():
    def forward(m, x):
        return m.b(torch.stack([y.view(8, -1).view(y.shape) for y in m.a(x)]))

    slimmed = slim(Net(forward, a=conv(3, 8), b=conv(8, 2)).double().eval(), (image().double(),), share=0.6, seed=1)
    assert slimmed.error <= TOLERANCE and "" in slimmed.plan.forwards
    with pytest.raises(ShapeGuardError):
        slimmed.model(image(batch=3).double())


class Cropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 2)

    def forward(self, x):
        return self.b(self.a(x)[:, :, : math.isqrt(x.shape[2]), : ceil(x.shape[3] / 2)])


def test_functions_of_math_are_recorded_by_whatever_name():
    """Computed where they stand, they would tie the forward to images of one size."""
    model, x = Cropped(), image(size=16)
    wanted = model(x)
    assert torch.equal(rewritten(model, image(size=4))(x), wanted)


@pytest.mark.parametrize("rank", [lambda y: y.ndim, lambda y: y.dim()], ids=["ndim", "dim()"])
def test_what_is_looked_up_by_the_number_of_dimensions_is_found(rank):
    """As einops looks for the form of a rearrangement; a proxy would be no key."""
    forms = {3: None, 4: (0, 2, 3, 1)}

    def forward(m, x):
        y = m.a(x)
        rows = y.permute(forms[rank(y)]).reshape(len(y), -1, 8)
        return m.b(rows.transpose(1, 2).reshape(y.shape))

    model = Net(forward, a=conv(3, 8), b=conv(8, 2)).double().eval()
    slimmed = assert_exact(model, (image().double(),))
    assert slimmed.analysis.channel_map.size == 8
    slimmed = slim(model, (image().double(),), share=0.6, seed=1)
    with pytest.raises(ShapeGuardError, match="4"):
        slimmed.model(image().double()[0])


def test_what_is_found_in_a_shape_is_guarded():
    def forward(m, x):
        y = m.a(x).reshape(len(x), 8, *x.shape[2:])
        return m.b(y if 5 in y.shape else y.relu())

    slimmed = slim(Net(forward, a=conv(3, 8), b=conv(8, 2)).double().eval(), (image().double(),), share=0.6, seed=1)
    assert slimmed.error <= TOLERANCE and "" in slimmed.plan.forwards
    slimmed.model(image(size=6, batch=3).double())
    with pytest.raises(ShapeGuardError):
        slimmed.model(image(size=5).double())


def test_guards_on_sizes_that_slimming_changes_go():
    """`y.shape[1] % 2 == 0` decided the control flow when all channels were there; the decision stays."""
    model = Net(loops, a=conv(3, 8), b=conv(2, 2), scales=nn.ParameterList([nn.Parameter(torch.rand(1))] * 4))
    slimmed = slim(model.double().eval(), (image().double(),), share=0.5, seed=1)
    assert slimmed.plan.live.tolist() != [True, True]
    assert slimmed.error <= TOLERANCE


def test_tensors_made_from_numbers_are_seen():
    def forward(m, x):
        y = m.a(x)
        ramp = torch.arange(x.shape[-1], dtype=x.dtype) + torch.tensor([0.5], dtype=x.dtype)
        first, second = y.split([3, 5], 1)
        return m.b(torch.cat([second * ramp, first * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)], 1))

    slim_model, gated = slim_and_gated(lambda: Net(forward, a=conv(3, 8), b=conv(8, 2)), image().double())
    args = (image(size=6, batch=3).double(),)
    assert relative_error(run_eval(slim_model, args), run_eval(gated, args)) <= TOLERANCE


def test_plain_tensor_attributes_are_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 2)
            self.scale = torch.tensor([2.0])  # no parameter and no buffer

        def forward(self, x):
            first, second = self.a(x).split([3, 5], 1)
            return self.b(torch.cat([second, first], 1) * self.scale.to(x))

    slimmed = assert_exact(Scaled().double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 8


def test_what_cannot_be_followed_is_refused_and_leaves_nothing_behind():
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        hidden = torch.Tensor([1.0])  # made by a class, which torch.fx does not see
        return m.b(torch.cat([second, first], 1) + hidden)

    model = Net(forward, a=conv(3, 8), b=conv(8, 2)).eval()
    names = [set(vars(module)) for module in model.modules()]
    analysis = analyse(model, (image(),))
    assert [set(vars(module)) for module in model.modules()] == names
    assert analysis.channel_map.size == 0
    with pytest.raises(TraceError):
        traced(model, image())


def test_a_module_called_in_several_ways_loses_channels_in_each():
    class Half(nn.Module):
        def forward(self, x, drop=False):
            first, second = x.chunk(2, 1)
            return second if drop else torch.cat([second, first], 1)

    half = Half()
    model = Net(
        lambda m, x: m.c(m.swap(m.a(x))) + m.d(m.swap(m.b(x), drop=True)),
        a=conv(3, 8), b=conv(3, 8), swap=half, c=conv(8, 2), d=conv(4, 2),
    )  # fmt: skip
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 12  # what is dropped goes without what is not


def test_a_module_called_twice_the_same_way_loses_the_same_channels():
    class Half(nn.Module):
        def forward(self, x):
            first, second = x.chunk(2, 1)
            return torch.cat([second, first], 1)

    model = Net(
        lambda m, x: m.c(m.swap(m.a(x))) + m.d(m.swap(m.b(x))),
        a=conv(3, 8), b=conv(3, 8), swap=Half(), c=conv(8, 2), d=conv(8, 2),
    )  # fmt: skip
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 8


@torch.fx.wrap
def _halves(x):
    left, right = x.chunk(2, 1)
    return left * right


def test_functions_declared_leaves_are_followed():
    """torchvision's windowed attention is one."""
    model = Net(lambda net, x: net.head(_halves(net.stem(x))), stem=conv(3, 8), head=conv(4, 2)).double()
    slimmed = assert_exact(model, (image().double(),))
    assert Side("stem.weight", 0) in slimmed.analysis.channel_map.classes


@pytest.mark.parametrize(
    "scale",
    [lambda x: x.shape[1] ** -0.5, lambda x: x.shape[1], lambda x: 1 / x.shape[1], lambda x: x.shape[2] * x.shape[1]],
)
def test_a_factor_computed_from_a_width_stays_what_it_was(scale):
    def forward(net, x):
        left, right = net.stem(x).chunk(2, 1)
        return net.head(left * scale(left) + right)

    model = Net(forward, stem=conv(3, 8), head=conv(4, 2)).double()
    slimmed = assert_exact(model, (image().double(),))
    assert Side("stem.weight", 0) in slimmed.analysis.channel_map.classes


def in_full_precision(m, x):
    first, second = m.a(x).split([3, 5], 1)
    with torch.autocast(device_type=x.device.type, enabled=False):
        y = torch.cat([first, second * second], 1).float()
    return m.b(y)


def test_where_a_forward_leaves_autocast_it_leaves_it_rewritten():
    example = image()
    model = Net(in_full_precision, a=conv(3, 8), b=conv(8, 2)).eval()
    gated = copy.deepcopy(model)
    slimmed = slim(model, (example,), {}, share=0.5, seed=3)
    zero_kernels(gated, slimmed.analysis.channel_map, random_live(slimmed.analysis.channel_map.size, 0.5, 3))
    assert "" in slimmed.plan.forwards
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [run_eval(one, (example,)) for one in (model, gated)]
        assert torch.is_autocast_enabled("cpu")
    assert relative_error(*outputs) <= 1e-2
    assert not torch.is_autocast_enabled("cpu")


def partly_without_gradients(m, x):
    y = m.a(x).view(x.shape[0], 4, 2, -1)
    with torch.no_grad():
        y = y * y.detach()
    return m.b(y.reshape(x.shape[0], 8, *x.shape[2:]))


def test_what_is_computed_without_gradients_is_in_the_graph():
    model = Net(partly_without_gradients, a=conv(3, 8), b=conv(8, 2)).eval()
    modes = [node.args[0] for node in traced(model, image()).nodes if node.target is torch._C._set_grad_enabled]
    assert modes[0] is False and modes[-1].target is torch.is_grad_enabled
    slimmed = assert_exact(model.double(), (image().double(),))
    assert slimmed.analysis.channel_map.size == 4
    assert torch.is_grad_enabled()


class Asks(nn.Module):
    """Uses its mode as nothing but a bool can be used."""

    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.use = conv(3, 8), conv(8, 2), use

    def forward(self, x):
        first, second = self.a(x).split([3, 5], 1)
        return self.b(torch.cat([first, second], 1)) * self.use(self.training)


@pytest.mark.parametrize(
    "use", [lambda mode: 3 - mode, lambda mode: 2 if mode else 3, lambda mode: {True: 2, False: 3}[mode]]
)
def test_each_use_of_the_mode_is_seen(use):
    slim_model, gated = slim_and_gated(lambda: Asks(use), image().double())
    example = image().double()
    for mode in (False, True):
        assert relative_error([slim_model.train(mode)(example)], [gated.train(mode)(example)]) <= TOLERANCE


def test_a_forward_that_does_not_ask_for_its_mode_is_traced_once():
    analysis = analyse(Split(), (image(),))
    assert [one.modes for one in analysis.traced] == [(False, True)]


class Shares(nn.Module):
    """A child that stands in another module too, where it was registered first."""

    def __init__(self, child):
        super().__init__()
        self.a, self.child, self.b = conv(3, 8), child, conv(8, 2)

    def forward(self, x):
        first, second = self.a(x).split([4, 4], 1)
        return self.b(torch.cat([self.child(first), second], 1))


def test_a_child_with_two_names_is_known_by_either():
    child = conv(4, 4, 3)
    model = Net(lambda m, x: m.second(F.pad(m.first(x), (0, 0, 0, 0, 0, 1))), first=Shares(child), second=Shares(child))
    slimmed = assert_exact(model.double().eval(), (image().double(),))
    assert {"first", "second"} <= set(slimmed.plan.forwards)


class Calling(nn.Module):
    """Calls a layer that it is handed."""

    def forward(self, x, layer):
        return layer(x).relu()


def test_a_layer_that_is_handed_to_another_is_followed():
    def forward(m, x):
        first, second = m.a(x).split([4, 4], 1)
        return m.b(m.calling(torch.cat([second, first], 1), m.head))

    model = Net(forward, a=conv(3, 8), calling=Calling(), head=conv(8, 6), b=conv(6, 2)).double()
    assert assert_exact(model, (image().double(),)).analysis.channel_map.size == 8 + 6
    assert "forward" in vars(slim(model, (image().double(),)).model)


def test_a_parameter_is_read_under_its_second_name():
    class Tied(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            first, second = torch.conv2d(x, self.weight).chunk(2, 1)
            return first * second

    first = conv(3, 8)
    model = Net(lambda m, x: m.c(m.b(x) + m.a(x).chunk(2, 1)[0]), a=first, b=Tied(first.weight), c=conv(4, 2))
    assert_exact(model.double(), (image().double(),))
    assert "b" in {one.path for one in analyse(model, (image().double(),)).traced}
