"""FLOPs, parameters, activations and resources of one's own: value, price and drop."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autogate.budget.products import Activations, Flops, Params, Products, Term
from autogate.budget.resource import Resource, SideCounts
from rewriters import analyse
from rewriters.errors import AutogateError
from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Kernel, Side
from tests.autogate.gated_nets import ConvNet, conv_net_map


def counted_flops(channel_map: ChannelMap, live: torch.Tensor) -> float:
    """The same, by counting what `ChannelMap.kept` keeps."""
    return sum(channel_map.macs(kernel, live) for kernel in channel_map.kernels)


def some_live(size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("residual", [False, True])
def test_flops_are_those_of_the_kept_channels(residual):
    channel_map = conv_net_map(residual=residual)
    flops = Flops(channel_map)
    assert flops.whole == counted_flops(channel_map, torch.ones(channel_map.size, dtype=torch.bool))
    for seed in range(5):
        live = some_live(channel_map.size, seed)
        assert flops.value(live).item() == counted_flops(channel_map, live)


def test_pinned_channels_stay_in_the_count():
    classes = {
        Side("a.weight", 0): torch.tensor([0, ALWAYS, 1]),
        Side("b.weight", 1): torch.tensor([0, ALWAYS, 1]),
    }
    sizes = {Side("a.weight", 0): 3, Side("a.weight", 1): 4, Side("b.weight", 0): 5, Side("b.weight", 1): 3}
    kernels = (Kernel("a", "a.weight", 10.0, 1), Kernel("b", "b.weight", 1.0, 1))
    flops = Flops(ChannelMap(2, classes, sizes, kernels, (Side("b.weight", 1),), ()))
    assert flops.whole == 10 * 3 * 4 + 3 * 5
    assert flops.least == pytest.approx((10 * 4 + 5) / flops.whole)


def test_depthwise_kernels_cost_in_one_live_count():
    classes = {Side("d.weight", 0): torch.arange(4)}
    sizes = {Side("d.weight", 0): 4, Side("d.weight", 1): 1}
    flops = Flops(ChannelMap(4, classes, sizes, (Kernel("d", "d.weight", 7.0, 1, mixes=False),), (), ()))
    live = torch.tensor([True, False, True, False])
    assert flops.value(live).item() == 14
    assert flops.price(live).tolist() == [7, 7, 7, 7]


def test_price_is_the_derivative_by_the_live_counts():
    """Checked on the products themselves, each class's count being a real number."""
    channel_map = conv_net_map(residual=True)
    live = some_live(channel_map.size).double().requires_grad_()

    def count(side):
        return live[channel_map.classes[side]].sum() if side in channel_map.classes else channel_map.sizes[side]

    value = sum(kernel.macs * count(kernel.input_side) * count(kernel.output_side) for kernel in channel_map.kernels)
    (expected,) = torch.autograd.grad(value, live)
    torch.testing.assert_close(Flops(channel_map).price(live.detach().bool()), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_drop_is_what_one_death_saves(residual):
    channel_map = conv_net_map(residual=residual)
    flops = Flops(channel_map)
    live = some_live(channel_map.size)
    drop = flops.drop(live)
    for label in torch.nonzero(live).flatten().tolist():
        without = live.clone()
        without[label] = False
        assert drop[label].item() == (flops.value(live) - flops.value(without)).item()


def test_a_class_counts_as_often_as_it_lies_on_a_side():
    """A flatten gives a linear layer's input many indices of one class."""
    flops = Products(SideCounts(2, [0.0, 10.0], [[0, 0, 0, 1, 1, 1], []]), [Term(1.0, 0, 1)])
    assert flops.whole == 60
    assert flops.price(torch.tensor([True, True])).tolist() == [30, 30]


def test_params_are_those_of_the_sliced_model():
    channel_map = conv_net_map()
    net = ConvNet()
    params = Params(channel_map, net)
    assert params.whole == sum(parameter.numel() for parameter in net.parameters())
    live = some_live(channel_map.size)
    kept = 0
    for name, parameter in net.named_parameters():
        shape = list(parameter.shape)
        for side in channel_map.classes:
            if side.tensor == name:
                shape[side.dim] = len(channel_map.kept(side, live))
        kept += torch.Size(shape).numel()
    assert params.value(live).item() == kept


def test_shared_parameters_count_once():
    net = nn.Module()
    net.first = nn.Linear(3, 3)
    net.second = nn.Linear(3, 3, bias=False)
    net.second.weight = net.first.weight
    classes = {Side("second.weight", 0): torch.arange(3), Side("first.bias", 0): torch.arange(3)}
    params = Params(ChannelMap(3, classes, {}, (), (), ()), net)
    assert params.whole == 12
    assert params.value(torch.tensor([True, False, False])).item() == 4


def test_params_may_carry_channels_in_three_dimensions_and_not_in_four():
    classes = {Side("weight", dim): torch.arange(2) for dim in range(4)}
    three = {side: labels for side, labels in classes.items() if side.dim < 3}
    params = Params(ChannelMap(2, three, {}, (), (), ()), nn.Conv1d(2, 2, 2, bias=False))
    assert params.whole == 8 and params.value(torch.tensor([True, False])).item() == 1
    with pytest.raises(AutogateError, match="weight: it has channels in 4 dimensions"):
        Params(ChannelMap(2, classes, {}, (), (), ()), nn.Conv2d(2, 2, 2))


def three_factors() -> Products:
    """Terms of up to three ends, drawn at random; ends share classes, one class lies on an end repeatedly."""
    draw = torch.Generator().manual_seed(0)
    ends = [torch.randint(ALWAYS, 7, (length,), generator=draw).tolist() for length in (3, 5, 5, 8, 2)]
    counts = SideCounts(7, [float(end.count(ALWAYS)) for end in ends], ends)
    places = torch.randint(5, (12, 3), generator=draw).tolist()
    terms = [Term(float(place + 1), *ends[: place % 4]) for place, ends in enumerate(places)]
    assert {sum(end is not None for end in term[1:]) for term in terms} == {0, 1, 2, 3}
    return Products(counts, terms)


@pytest.mark.parametrize("seed", range(5))
def test_drop_is_what_one_death_saves_of_three_factors(seed):
    products, live = three_factors(), some_live(7, seed)
    for label in torch.nonzero(live).flatten().tolist():
        without = live.clone()
        without[label] = False
        assert products.drop(live)[label].item() == (products.value(live) - products.value(without)).item()


def test_a_layer_that_runs_for_each_channel_of_others_costs_by_their_count():
    """Two layers across tokens: one for channels 0, 1 and a pinned one, one for 2, which its own sides hold too."""
    classes = {Side("b.weight", 0): torch.tensor([2, 3])}
    sizes = {Side("a.weight", 0): 4, Side("a.weight", 1): 5, Side("b.weight", 0): 2, Side("b.weight", 1): 3}
    kernels = (
        Kernel("a", "a.weight", 10.0, 1, outputs=2.0, repeats=(0, 1, ALWAYS)),
        Kernel("b", "b.weight", 1.0, 1, repeats=(2,)),
    )
    channel_map = ChannelMap(4, classes, sizes, kernels, (), ())
    assert channel_map.reached(kernels[0])
    assert not channel_map.reached(Kernel("a", "a.weight", 10.0, 1, repeats=(ALWAYS, ALWAYS)))
    flops = Flops(channel_map)
    assert flops.whole == 10 * 20 * 3 + 1 * 6 * 1
    live = torch.tensor([True, False, True, True])
    assert flops.value(live).item() == 10 * 20 * 2 + 6 == counted_flops(channel_map, live)
    assert flops.price(live).tolist() == [200, 200, 3 + 6, 3]
    assert flops.drop(live)[2].item() == 6
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(3, 2)})
    assert Activations(channel_map, model).value(live).item() == 4 * 2.0 * 4 * 2


class Touched(TorchDispatchMode):
    """Counts the elements that ops read and write."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += sum(leaf.numel() for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor))
        return out


def touched(kind: type[Resource], depth: int, width: int) -> float:
    """Elements, for each class of so many linear layers, that a resource's answers take."""
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    channel_map = analyse(net, (torch.randn(2, width),), {}).channel_map
    resource, live = kind(channel_map, net), some_live(channel_map.size)
    assert channel_map.size == (depth - 1) * width
    with Touched() as counter:
        resource.value(live), resource.price(live), resource.drop(live)
    return counter.count / channel_map.size


@pytest.mark.parametrize("kind", [Flops, Params, Activations])
@pytest.mark.parametrize(("depth", "width"), [(5, 640), (41, 64)])
def test_what_it_takes_is_linear_in_the_classes(kind, depth, width):
    """Ten times the classes, of wider layers or of more of them."""
    assert touched(kind, depth, width) <= 1.1 * touched(kind, 5, 64)


def test_a_map_without_classes_has_a_value():
    sizes = {Side("a.weight", 0): 3, Side("a.weight", 1): 4}
    flops = Flops(ChannelMap(0, {}, sizes, (Kernel("a", "a.weight", 2.0, 1),), (), ()))
    assert flops.whole == 24
    assert flops.share(torch.ones(0, dtype=torch.bool)) == 1
