"""Limits: bounds on the share of channels that layers keep, in training and against pins, budgets and each other."""

import pytest
import timm
import torch
from torch import nn

import autogate
from autogate.budget.products import Flops
from autogate.budget.targets import Target, Targets
from autogate.steering.groups import groups_of
from autogate.steering.limits import Limit, exceeded, limited
from autogate.steering.schedule import Schedule
from autogate.steering.selection import Selection
from rewriters.errors import AutogateError
from tests.autogate.gated_nets import ConvNet, conv_net_map, flops_target, train

EXAMPLE = torch.randn(2, 3, 6, 6)


def conv_limit(layer: int, least: float, most: float = 1.0) -> Limit:
    return Limit(f"conv{layer}", least, most, (f"conv{layer}.weight", f"conv{layer}.bias"))


def counts(*limits: Limit, round_to: int = 1) -> list[tuple[int, int | None]]:
    return [(group.least, group.most) for group in limited(groups_of(conv_net_map(), round_to), conv_net_map(), limits)]


def trained(limits, flops=0.5, steps=80, net=None, **options) -> nn.Module:
    torch.manual_seed(0)
    model = autogate.prepare(net or ConvNet(), EXAMPLE, flops=flops, steps=steps, limits=limits, **options)
    train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), steps)
    return model


def test_shares_become_numbers_of_classes():
    assert counts(conv_limit(1, 0.8), conv_limit(2, 0.25, 0.5)) == [(13, None), (6, 12), (0, None)]
    assert counts(conv_limit(2, 0.3, 0.7), round_to=8) == [(0, None), (8, 16), (0, None)]


def test_layers_above_their_limit_are_named():
    model = trained({"conv2": (0.1, 0.5)}, flops=0.9, steps=1)
    bank = autogate.gates(model)
    with torch.no_grad():
        bank.alpha[:3] = 0  # of conv1
    with pytest.warns(autogate.BudgetNotMetWarning, match=r"left.* and conv2 has 24 channels .* limit lets 12 stay"):
        autogate.finalize(model)
    done = trained({"conv2": (0.1, 0.5)})
    live = autogate.gates(done).live
    assert exceeded(autogate.gates(done).learner.groups, autogate.gates(done).channel_map, live) == ""


def test_a_classifier_is_bounded_by_what_it_reads():
    assert counts(Limit("fc", 0.5, 1.0, ("fc.weight", "fc.bias"))) == [(0, None), (0, None), (12, None)]


def test_a_norm_is_bounded_by_its_channels():
    assert counts(Limit("norm2", 0.5, 1.0, ("norm2.weight", "norm2.running_mean"))) == [
        (0, None),
        (12, None),
        (0, None),
    ]


def test_a_selection_takes_no_more_than_limits_leave_and_all_that_is_above_them():
    groups = limited(groups_of(conv_net_map(), 1), conv_net_map(), [conv_limit(1, 0.9), conv_limit(2, 0.1, 0.5)])
    channel_map = conv_net_map()
    selection = Selection(flops_target(channel_map, 0.5), Schedule(100), groups)
    everything = torch.ones(64, dtype=torch.bool)
    dead = selection.deaths(torch.rand(64), everything, everything, 100).classes
    live = everything.index_fill(0, dead, False)
    assert live[:16].sum() >= 15 and live[16:40].sum() <= 12
    assert abs(Flops(channel_map).share(live) - 0.5) <= 0.01


def test_where_the_budget_is_met_anyway_only_layers_above_their_limits_go_on():
    groups = limited(groups_of(conv_net_map(), 1), conv_net_map(), [conv_limit(2, 0.1, 0.5)])
    selection = Selection(Targets([Target(Flops(conv_net_map()), 1.0)]), Schedule(100), groups)
    everything = torch.ones(64, dtype=torch.bool)
    assert selection.distance(everything) == 1
    price = selection.price(everything)
    assert (price[16:40] > 0).all() and (price[:16] == 0).all() and (price[40:] == 0).all()
    dead = selection.deaths(torch.rand(64), everything, everything, 100).classes
    assert len(dead) == 12 and ((dead >= 16) & (dead < 40)).all()


@pytest.mark.parametrize("flops", [0.4, 0.9, 1.0])
def test_limits_are_met_in_training(flops):
    model = trained({"conv1": 0.8, "conv2": (0.1, 0.5), "fc": (0.3, 0.75)}, flops)
    bank = autogate.gates(model)
    assert bank.progress().settled
    slim = autogate.finalize(model)
    assert slim.conv1.out_channels >= 13 and 3 <= slim.conv2.out_channels <= 12
    assert 8 <= slim.fc.in_features <= 18


def test_with_multiples_too():
    slim = autogate.finalize(trained({"conv2": (0.3, 0.7)}, 0.9, round_to=8))
    assert slim.conv2.out_channels in (8, 16)


def test_a_stage_is_bounded_by_the_channels_that_it_makes():
    """Not by those of the stage before, which its first block reads."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4)
    limits = {"layer1": 0.9, "layer2": (0.1, 0.5), "layer[34].*.conv1": (0.25, 1.0)}
    bank = autogate.gates(autogate.prepare(model, torch.randn(2, 3, 32, 32), flops=0.5, limits=limits))
    by_side = {
        side.tensor: group
        for group, found in zip(bank.learner.groups, bank.channel_map.groups(), strict=True)
        for side in found.sides
        if side.dim == 0
    }
    for name, least, most in [("layer1.0.conv2", 58, None), ("layer1.1.conv1", 58, None), ("layer2.0.conv1", 13, 64),
                              ("layer2.1.conv2", 13, 64), ("layer3.0.conv1", 64, None), ("layer3.0.conv2", 0, None),
                              ("conv1", 58, None)]:  # fmt: skip
        group = by_side[f"{name}.weight"]
        assert (group.least, group.most) == (least, most), name


def test_one_is_what_ignore_does():
    asked = [autogate.prepare(ConvNet(), EXAMPLE, **way) for way in ({"limits": {"conv2": 1.0}}, {"ignore": ["conv2"]})]
    maps = [autogate.gates(model).channel_map for model in asked]
    assert maps[0].size == maps[1].size == 24 and maps[0].difference(maps[1]) is None


@pytest.mark.parametrize(
    ("limits", "options", "message"),
    [
        ({"conv9": 0.5}, {}, r"limits names 'conv9', which is neither.*Did you mean 'conv3'"),
        ({"conv9.*": 0.5}, {}, r"limits names 'conv9\.\*'"),
        ({"conv1": 1.5}, {}, r"limits has 1\.5 for 'conv1'"),
        ({"conv1": (0.5, 0.2)}, {}, r"limits has \(0\.5, 0\.2\) for 'conv1'"),
        ({"conv1": "0.5"}, {}, r"limits has '0\.5' for 'conv1'"),
        ({"conv1": (0.0, 0.0)}, {}, r"limits has \(0\.0, 0\.0\)"),
        (
            {"conv2": (0.1, 0.3), "norm2": 0.5}, {},
            r"'norm2' asks for at least 0\.5, 'conv2' for at least 0\.1 and at most 0\.3, of the same channels",
        ),
        ({"conv2": (0.0, 0.5)}, {"ignore": ["conv2"]}, r"all of them are pinned\. .*the caller asked for it"),
        ({"conv2": (0.4, 0.6)}, {"round_to": 8}, r"no width .* portions of 8 meets 'conv2' \(at least 0\.4 and at"),
        ({"conv1": (0.0, 0.05)}, {}, r"no width .* portions of 1 meets 'conv1' \(at most 0\.05\)"),
        ({"*": 0.9}, {"flops": 0.3}, r"0\.300 of the FLOPs can't be reached: 0\.\d+ are left .*`limits` asks for"),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_met_are_refused(limits, options, message):
    net = ConvNet()
    with pytest.raises(AutogateError, match=message):
        autogate.prepare(net, EXAMPLE, limits=limits, **options)
    assert not hasattr(net, "autogate")


def test_rounding_takes_no_whole_layer():
    """Layers no wider than a multiple stay, wider ones keep one multiple: if that is too much, prepare says so."""
    example = torch.randn(2, 3, 32, 32)
    for name, round_to, least in [
        ("test_resnet", 32, "0.842"),
        ("resnet10t", 64, "0.581"),
        ("resnet10t", 512, "1.000"),
    ]:
        with pytest.raises(AutogateError, match=f"can't be reached: {least} are left when every layer has its least"):
            autogate.prepare(timm.create_model(name, num_classes=4), example, flops=0.5, round_to=round_to)
    model = autogate.prepare(timm.create_model("test_resnet", num_classes=4), example, flops=0.45, round_to=16)
    bank = autogate.gates(model)
    dead = bank.learner.selection.choose(torch.rand(bank.channel_map.size), bank.live, bank.live, 0.0).classes
    left = bank.live.index_fill(0, dead, False)
    for group in bank.learner.groups:
        assert left[list(group.classes)].sum() >= 16
    assert abs(bank.targets.shares(left)["FLOPs"] - 0.45) < 0.1
