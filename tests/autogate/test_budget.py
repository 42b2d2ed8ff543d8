import pytest
import torch

from autogate.budget import Budget, Pressure, Selection, keep_counts, steer
from autogate.resources import Bilinear, Flops, Term
from rewriters.errors import AutogateError
from tests.autogate.gated_nets import conv_net_map


def linear_resource(prices: list[float]) -> Bilinear:
    """Every class costs its own price, whatever the others do."""
    size = len(prices)
    terms = [Term(price, label, size) for label, price in enumerate(prices)]
    return Bilinear(size, terms, [0.0] * size + [1.0], [[label] for label in range(size)] + [[]])


def deaths(selection: Selection, sizes: list[float], step: int, live: list[bool] | None = None):
    alive = torch.tensor(live or [True] * len(sizes))
    return selection.deaths(torch.tensor(sizes), alive.clone(), alive, step)


@pytest.mark.parametrize(
    "settings", [{"flops": 0.0}, {"flops": 1.2}, {"flops": 0.5, "steps": 0}, {"flops": 0.5, "reach": 1.0}]
)
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(AutogateError, match="it must be"):
        Budget(**settings)


def test_wanted_share_falls_to_the_target_and_stays():
    budget = Budget(0.4, steps=1000)
    assert budget.wanted(0) == 1
    assert budget.wanted(175) == pytest.approx(0.7)
    assert budget.wanted(350) == budget.wanted(1000) == pytest.approx(0.4)


def test_short_runs_may_take_longer_steps():
    assert Budget(0.5, steps=10_000).step_bound == 0.02
    assert Budget(0.5, steps=100).step_bound > 4 / 36


def test_no_pressure_below_the_wanted_share_and_the_integral_waits():
    budget = Budget(0.5, steps=1000)
    pressed = steer(budget, Pressure(), 1.0, 100)
    assert pressed.movement > 0 and pressed.integral > 0
    released = steer(budget, pressed, 0.6, 101)
    assert released.movement == 0 and released.integral == pressed.integral and not released.settled


def test_pressure_ends_for_good_when_the_target_is_met():
    budget = Budget(0.5, steps=1000)
    settled = steer(budget, Pressure(integral=3.0), 0.5, 400)
    assert settled.settled and settled.movement == 0
    assert steer(budget, settled, 0.9, 401) == settled


def test_pressure_is_the_same_course_at_every_length_of_run():
    """Alpha of mean price goes the same way in the same part of the run, whatever its length."""
    ways = []
    for steps in (300, 30_000):
        budget, pressure, way = Budget(0.5, steps), Pressure(), 0.0
        for step in range(1, int(0.2 * steps)):
            pressure = steer(budget, pressure, 1.0, step)
            way += pressure.movement
        ways.append(way)
    assert ways[0] == pytest.approx(ways[1], rel=0.1)


def test_pressure_outgrows_every_gradient_before_the_deadline():
    for steps in (100, 10_000):
        budget, pressure = Budget(0.5, steps), Pressure()
        for step in range(1, int(0.9 * steps)):
            pressure = steer(budget, pressure, 0.52, step)
        assert pressure.movement > 10 * budget.step_bound


def test_only_as_many_die_as_the_wanted_share_asks_for_smallest_first():
    selection = Selection(Budget(0.5, steps=100, keep=0), linear_resource([1.0] * 10), [list(range(10))])
    sizes = [0.5, 0.1, 0.9, 0.2, 0.3, 0.8, 0.7, 0.6, 0.4, 1.0]
    assert deaths(selection, sizes, 14).classes.tolist() == [1, 3]
    assert deaths(selection, sizes, 100).classes.tolist() == [1, 3, 4, 8, 0]


def test_all_candidates_die_while_the_wanted_share_is_out_of_reach():
    selection = Selection(Budget(0.2, steps=100), linear_resource([1.0] * 10), [list(range(10))])
    candidates = torch.zeros(10, dtype=torch.bool)
    candidates[[2, 5]] = True
    found = selection.deaths(torch.ones(10), candidates, torch.ones(10, dtype=torch.bool), 100)
    assert sorted(found.classes.tolist()) == [2, 5]


def test_of_equal_candidates_the_dearest_dies_and_then_the_first():
    selection = Selection(Budget(0.5, steps=100, keep=0), linear_resource([1, 2, 2, 1.0]), [[0, 1, 2, 3]])
    assert deaths(selection, [0.1] * 4, 11).classes.tolist() == [1]


def test_a_candidate_that_would_overshoot_is_passed_over_for_one_that_fits():
    selection = Selection(Budget(0.5, steps=100, keep=0), linear_resource([70, 20, 10, 50, 50.0]), [[0, 1, 2, 3, 4]])
    # 100 of 200 are to go: the first would take 70, leaving 30; with the second and third that is exact.
    assert sorted(deaths(selection, [0.1, 0.3, 0.4, 0.2, 0.5], 100).classes.tolist()) == [0, 1, 2]


def test_a_miss_within_the_tolerance_is_settled_for_once_patience_is_over():
    selection = Selection(Budget(0.5, steps=100, keep=0), linear_resource([50.6, 49.4]), [[0, 1]])
    waiting = deaths(selection, [0.2, 0.1], 36)
    assert waiting.classes.tolist() == [1] and not waiting.settled
    given_up = deaths(selection, [0.2, 0.1], 60)
    assert given_up.classes.tolist() == [1] and given_up.settled


def test_without_any_that_fits_the_least_overshoot_is_taken_in_the_end():
    selection = Selection(Budget(0.7, steps=100, keep=0), linear_resource([50, 45, 5.0]), [[0, 1, 2]])
    candidates = torch.tensor([True, True, False])
    arguments = torch.tensor([0.1, 0.2, 1.0]), candidates, torch.ones(3, dtype=torch.bool)
    assert selection.deaths(*arguments, 37).classes.tolist() == []
    assert selection.deaths(*arguments, 60).classes.tolist() == [1]


def test_a_group_keeps_its_largest_classes():
    budget = Budget(0.4, steps=100, keep=0.4)
    selection = Selection(budget, linear_resource([1.0] * 10), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    found = deaths(selection, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 100)
    assert sorted(found.classes.tolist()) == [0, 1, 2, 5, 6, 7]


def test_groups_keep_less_only_if_the_target_takes_it():
    resource = linear_resource([1.0] * 10)
    groups = [list(range(5)), list(range(5, 10))]
    assert keep_counts(groups, Budget(0.6, keep=0.5), resource).tolist() == [3, 3]
    assert keep_counts(groups, Budget(0.3, keep=0.5), resource).tolist() == [1, 1]
    assert keep_counts(groups, Budget(0.1, keep=0.5), resource).tolist() == [0, 0]
    assert keep_counts(groups, Budget(0.6), resource).tolist() == [1, 1]


def test_classes_dead_already_count_against_what_a_group_gives():
    selection = Selection(Budget(0.2, steps=100, keep=0.2), linear_resource([1.0] * 5), [[0, 1, 2, 3, 4]])
    found = deaths(selection, [0.0, 0.0, 0.3, 0.2, 0.1], 100, [False, False, True, True, True])
    assert sorted(found.classes.tolist()) == [3, 4]


def test_selection_on_a_bilinear_resource_stops_at_the_wanted_share():
    channel_map = conv_net_map(residual=True)
    flops = Flops(channel_map)
    selection = Selection(Budget(0.5, steps=100), flops, [group.classes for group in channel_map.groups()])
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(channel_map.size, generator=generator)
    live = torch.ones(channel_map.size, dtype=torch.bool)
    dead = selection.deaths(size, live.clone(), live, 50).classes
    share = flops.share(live.index_fill(0, dead, False))
    assert 0.49 <= share <= 0.5


def test_the_course_begins_where_the_model_with_its_added_layers_stands():
    budget = Budget(0.5, steps=100, reach=0.5, start=1.5)
    assert [budget.wanted(step) for step in (0, 25, 50, 100)] == [1.5, 1.0, 0.5, 0.5]
    assert steer(budget, Pressure(), 1.5, 1).movement > 0
    assert steer(budget, Pressure(), 1.2, 10).movement == 0  # ahead of its course, though above the whole


def test_a_start_below_the_target_is_refused():
    with pytest.raises(AutogateError, match=r"start is 0\.4"):
        Budget(0.5, start=0.4)
