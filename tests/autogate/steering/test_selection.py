"""The selection of classes that die: enough, the smallest first, whole bundles, none that a group keeps."""

import pytest
import torch

from autogate.budget.products import Flops, Products, Term
from autogate.budget.resource import SideCounts
from autogate.budget.targets import Target, Targets
from autogate.steering.course import Course
from autogate.steering.groups import Group, groups_of
from autogate.steering.least_widths import keep_counts
from autogate.steering.schedule import Schedule
from autogate.steering.selection import Selection
from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Side
from tests.autogate.gated_nets import conv_net_map, flops_target


def priced(prices: list[float]) -> Products:
    """Every class costs its own price, whatever the others do."""
    size = len(prices)
    ends = SideCounts(size, [0.0] * size, [[label] for label in range(size)])
    return Products(ends, [Term(price, label) for label, price in enumerate(prices)])


def target(prices: list[float], share: float) -> Targets:
    return Targets([Target(priced(prices), share)])


def one_group(size: int, pace: int = 1) -> list[Group]:
    return [Group(tuple(range(size)), pace)]


def selection_of(prices: list[float], share: float, groups: list[Group] | None = None, **settings) -> Selection:
    schedule = Schedule(100, Course(**{"keep": 0, **settings}))
    return Selection(target(prices, share), schedule, groups or one_group(len(prices)))


def deaths(selection: Selection, sizes: list[float], step: int, live: list[bool] | None = None):
    alive = torch.tensor(live or [True] * len(sizes))
    return selection.deaths(torch.tensor(sizes), alive.clone(), alive, step)


def test_only_as_many_die_as_the_wanted_share_asks_for_smallest_first():
    selection = selection_of([1.0] * 10, 0.5)
    sizes = [0.5, 0.1, 0.9, 0.2, 0.3, 0.8, 0.7, 0.6, 0.4, 1.0]
    assert deaths(selection, sizes, 14).classes.tolist() == [1, 3]
    assert deaths(selection, sizes, 100).classes.tolist() == [1, 3, 4, 8, 0]


def test_all_candidates_die_while_the_wanted_share_is_out_of_reach():
    selection = selection_of([1.0] * 10, 0.2, keep=0.02)
    candidates = torch.zeros(10, dtype=torch.bool)
    candidates[[2, 5]] = True
    found = selection.deaths(torch.ones(10), candidates, torch.ones(10, dtype=torch.bool), 100)
    assert sorted(found.classes.tolist()) == [2, 5]


def test_of_equal_candidates_the_dearest_dies_and_then_the_first():
    selection = selection_of([1, 2, 2, 1.0], 0.5)
    assert deaths(selection, [0.1] * 4, 11).classes.tolist() == [1]


def test_a_candidate_that_would_overshoot_is_passed_over_for_one_that_fits():
    selection = selection_of([70, 20, 10, 50, 50.0], 0.5)
    # 100 of 200 are to go: the first would take 70, leaving 30; with the second and third that is exact.
    assert sorted(deaths(selection, [0.1, 0.3, 0.4, 0.2, 0.5], 100).classes.tolist()) == [0, 1, 2]


def test_a_miss_within_the_tolerance_is_settled_for_once_patience_is_over():
    selection = selection_of([50.6, 49.4], 0.5)
    waiting = deaths(selection, [0.2, 0.1], 36)
    assert waiting.classes.tolist() == [1] and not waiting.settled
    given_up = deaths(selection, [0.2, 0.1], 60)
    assert given_up.classes.tolist() == [1] and given_up.settled


def test_without_any_that_fits_the_least_overshoot_is_taken_in_the_end():
    selection = selection_of([50, 45, 5.0], 0.7)
    candidates = torch.tensor([True, True, False])
    arguments = torch.tensor([0.1, 0.2, 1.0]), candidates, torch.ones(3, dtype=torch.bool)
    assert selection.deaths(*arguments, 37).classes.tolist() == []
    assert selection.deaths(*arguments, 60).classes.tolist() == [1]


def test_a_group_keeps_its_largest_classes():
    groups = [Group((0, 1, 2, 3, 4)), Group((5, 6, 7, 8, 9))]
    selection = selection_of([1.0] * 10, 0.4, groups, keep=1.0)
    found = deaths(selection, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 100)
    assert sorted(found.classes.tolist()) == [0, 1, 2, 5, 6, 7]


def test_groups_keep_a_part_of_the_width_that_all_would_have_alike():
    groups = [Group(tuple(range(20))), Group(tuple(range(20, 30)), pace=4)]

    def kept(share: float, keep: float) -> list[int]:
        return keep_counts(groups, target([1.0] * 30, share), Schedule(course=Course(keep=keep))).tolist()

    # Narrowed alike to 0.4 there are 8 of 20 and a bundle of 4; any wider would take a second bundle.
    assert kept(0.5, 1.0) == [8, 4] and kept(0.5, 0.5) == [4, 4]
    assert kept(0.5, 0.0) == kept(1 / 6, 1.0) == [1, 4]
    assert kept(0.1, 0.5) == [0, 0]  # one and a bundle of 4 are more than a tenth


def test_classes_dead_already_count_against_what_a_group_gives():
    selection = selection_of([1.0] * 5, 0.2, keep=0.2)
    found = deaths(selection, [0.0, 0.0, 0.3, 0.2, 0.1], 100, [False, False, True, True, True])
    assert sorted(found.classes.tolist()) == [3, 4]


def test_selection_on_a_bilinear_resource_stops_at_the_wanted_share():
    channel_map = conv_net_map(residual=True)
    flops = Flops(channel_map)
    selection = Selection(flops_target(channel_map, 0.5), Schedule(steps=100), groups_of(channel_map, 1))
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(channel_map.size, generator=generator)
    live = torch.ones(channel_map.size, dtype=torch.bool)
    dead = selection.deaths(size, live.clone(), live, 50).classes
    share = flops.share(live.index_fill(0, dead, False))
    assert 0.49 <= share <= 0.5


def test_bundles_die_whole_the_ones_with_the_smallest_largest_first():
    selection = selection_of([1.0] * 12, 0.5, one_group(12, pace=4))
    sizes = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5, 1.0, 1.1, 1.2]
    # 6 are to go: one bundle of 4 on the way, a second one only when patience is over.
    assert sorted(deaths(selection, sizes, 36).classes.tolist()) == [1, 3, 5, 7]
    assert sorted(deaths(selection, sizes, 100).classes.tolist()) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_bundle_waits_until_it_is_full():
    selection = selection_of([1.0] * 12, 0.3, one_group(12, pace=4))
    live, candidates = torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
    candidates[[2, 5, 7]] = True
    assert len(selection.deaths(torch.ones(12), candidates, live, 100).classes) == 0
    candidates[[8, 9]] = True
    assert selection.deaths(torch.ones(12), candidates, live, 100).classes.tolist() == [2, 5, 7, 8]


def test_the_first_bundle_brings_an_odd_width_to_a_multiple():
    selection = selection_of([1.0] * 11, 0.6, one_group(11, pace=4))
    assert deaths(selection, [float(i) for i in range(11)], 20).classes.tolist() == [0, 1, 2]
    alive = [False] * 3 + [True] * 8
    assert deaths(selection, [float(i) for i in range(11)], 100, alive).classes.tolist() == [3, 4, 5, 6]


def test_a_group_narrower_than_a_bundle_stays_whole():
    groups = [Group((0, 1, 2), 4), Group(tuple(range(3, 11)), 4)]
    selection = selection_of([1.0] * 11, 0.7, groups, keep=0.02)
    found = deaths(selection, [0.0] * 3 + [1.0] * 8, 100).classes.tolist()
    assert found == [3, 4, 5, 6]


@pytest.mark.parametrize("round_to", [1, 3, 4, 8])
def test_whatever_dies_when_the_widths_stay_multiples(round_to):
    """Random candidates step by step, over groups of random widths: every group is whole or a multiple."""
    generator = torch.Generator().manual_seed(round_to)
    groups, start = [], 0
    for width in torch.randint(3, 40, (12,), generator=generator).tolist():
        groups.append(Group(tuple(range(start, start + width)), round_to))
        start += width
    prices = (torch.rand(start, generator=generator) + 0.1).tolist()
    selection = selection_of(prices, 0.4, groups, keep=0.02)
    live = torch.ones(start, dtype=torch.bool)
    for step in range(1, 100):
        candidates = live & (torch.rand(start, generator=generator) < 0.3)
        dead = selection.deaths(torch.rand(start, generator=generator), candidates, live, step).classes
        assert candidates[dead].all() and len(dead.unique()) == len(dead)
        live[dead] = False
        for group in groups:
            left = int(live[list(group.classes)].sum())
            assert left == len(group.classes) or (left % round_to == 0 and left >= min(round_to, len(group.classes)))
    assert selection.targets.shares(live)["resource"] <= 0.42


def test_a_class_of_many_channels_is_part_of_a_smaller_bundle():
    """8 heads of 4 channels each: two of them are a multiple of 8; a side of 6 for each takes four."""
    heads = torch.arange(8).repeat_interleave(4)
    wide = torch.arange(8).repeat_interleave(6)
    classes = {Side("proj.weight", 1): heads}
    assert groups_of(ChannelMap(8, classes, {}, (), (), ()), 8) == [Group(tuple(range(8)), 2)]
    classes[Side("other.weight", 1)] = torch.cat([wide, torch.full((2,), ALWAYS)])
    assert groups_of(ChannelMap(8, classes, {}, (), (), ()), 8) == [Group(tuple(range(8)), 4)]
