"""Several resources in one budget: the distance from all of their targets."""

import pytest
import torch

from autogate.budget.products import Flops, Params
from autogate.budget.targets import Shares, Target, Targets
from rewriters.errors import AutogateError
from tests.autogate.gated_nets import ConvNet, conv_net_map, flops_target


def some_live(size: int, seed: int = 0, part: float = 0.6) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < part


def two_targets(flops: float, params: float) -> Targets:
    channel_map = conv_net_map(residual=True)
    return Targets([Target(Flops(channel_map), flops), Target(Params(channel_map, ConvNet(residual=True)), params)])


def test_distance_is_one_at_the_start_and_zero_at_the_target():
    targets = flops_target(conv_net_map(), 0.4)
    live = torch.ones(targets.size, dtype=torch.bool)
    assert targets.distance(live) == 1
    for seed in range(4):
        live = some_live(targets.size, seed)
        share = targets.shares(live)["FLOPs"]
        assert targets.distance(live) == pytest.approx((share - 0.4) / 0.6)


def test_of_several_the_one_furthest_behind_counts():
    targets = two_targets(0.5, 0.2)
    for seed in range(8):
        live = some_live(targets.size, seed, 0.3 + seed / 20)
        shares = targets.shares(live)
        assert targets.distance(live) == pytest.approx(
            max((shares["FLOPs"] - 0.5) / 0.5, (shares["parameters"] - 0.2) / 0.8)
        )
        met = all(shares[name] <= share for name, share in targets.wanted().items())
        assert (targets.distance(live) <= 0) == met


def test_distance_without_each_is_that_after_its_death():
    targets = two_targets(0.5, 0.4)
    live = some_live(targets.size)
    found = targets.distance_without_each(live)
    for label in torch.nonzero(live).flatten().tolist():
        without = live.clone()
        without[label] = False
        assert found[label].item() == pytest.approx(targets.distance(without))


def test_a_price_is_relative_to_the_mean_and_follows_what_is_behind():
    targets = two_targets(0.5, 0.4)
    live = some_live(targets.size)
    assert targets.price(live)[live].mean().item() == pytest.approx(1)
    live = some_live(targets.size, part=0.75)
    only = two_targets(0.99, 0.1)
    assert only.targets[0].distance(live) < 0 < only.targets[1].distance(live)
    price = only.targets[1].resource.price(live)
    torch.testing.assert_close(only.price(live), price / price[live].mean())


def test_a_target_that_is_met_from_the_start_asks_for_nothing():
    targets = two_targets(1.0, 0.5)
    live = some_live(targets.size)
    assert targets.distance(live) == targets.targets[1].distance(live)
    idle = two_targets(1.0, 1.0)
    assert idle.distance(live) == 0 and not idle.price(live).any()


def test_two_targets_for_one_resource_are_refused():
    flops = Flops(conv_net_map())
    with pytest.raises(AutogateError, match="the FLOPs have several targets"):
        Targets([Target(flops, 0.5), Target(flops, 0.3)])


def test_what_is_out_of_reach_is_named():
    targets = two_targets(0.5, 0.5)
    assert targets.out_of_reach() == ()
    least = targets.targets[1].resource.least
    assert least > 0
    assert [target.share for target in two_targets(0.5, least / 2).out_of_reach()] == [least / 2]


@pytest.mark.parametrize("asked", [{"flops": 0.0}, {"params": 1.2}, {"latency": -1}, {"resources": {Flops: 2.0}}])
def test_shares_outside_their_range_are_refused(asked):
    with pytest.raises(AutogateError, match=r"must be in \(0, 1\]"):
        Shares(**asked)


def test_half_the_flops_are_asked_for_if_nothing_is():
    channel_map, inputs = conv_net_map(), ((torch.zeros(2, 3, 6, 6),), {})
    assert Shares().targets(ConvNet(), channel_map, inputs).wanted() == {"FLOPs": 0.5}
    asked = Shares(params=0.3, activations=0.6, resources={Flops: 0.4}).targets(ConvNet(), channel_map, inputs)
    assert asked.wanted() == {"parameters": 0.3, "activations": 0.6, "FLOPs": 0.4}
