"""Widths between subnets: as near to the budget as whole channels allow, never above, and exact."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import autogate
from autogate import subnets
from autogate.switching import SUBNETS
from autogate.switching.widths import Neighbour, interpolate
from rewriters import analyse
from tests.autogate.switching.nets import small_net


@pytest.fixture
def switchable():
    model, example = small_net()
    found = subnets.find(model, example, flops=(0.1, 0.4), by="l2")
    return subnets.fuse(model, found), example


def live_of(model, structure):
    dense = subnets.extract(model, "full")
    return structure.live(analyse(dense, (torch.randn(3, 3, 32, 32, dtype=torch.float64),)).channel_map)


@pytest.mark.parametrize("share", [0.16, 0.3, 0.7])
def test_a_width_between_two_subnets_keeps_to_its_budget(switchable, share):
    model, example = switchable
    made = subnets.switch(model, flops=share, between=True)
    assert share - 0.005 < made.shares["FLOPs"] <= share
    rows = [row.structure for row in subnets.status(model).rows]
    narrower, wider = (rows[0], rows[1]) if share < 0.4 else (rows[1], rows[2])
    low, live, high = (live_of(model, one) for one in (narrower, made, wider))
    assert not (low & ~live).any() and not (live & ~high).any()
    dense = analyse(subnets.extract(model, "full"), (example,)).channel_map
    ways = []
    for group in dense.groups():
        classes = torch.tensor(group.classes)
        lacking, come = int((high & ~low)[classes].sum()), int((live & ~low)[classes].sum())
        if lacking:  # a group is at most one channel ahead of the way that all have gone
            ways.append(((come - 1) / lacking, (come + 1) / lacking))
    assert len(ways) > 3 and max(way for way, _ in ways) < min(way for _, way in ways)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(model(example), subnets.extract(model, made.name)(example))


def test_the_channels_that_died_last_come_first(switchable):
    model, example = switchable
    narrow = subnets.status(model).rows[0].structure
    channel_map = analyse(subnets.extract(model, "full"), (example,)).channel_map
    died = narrow.died(channel_map)
    live = live_of(model, subnets.switch(model, flops=0.3, between=True))
    low = narrow.live(channel_map)
    checked = 0
    for group in channel_map.groups():
        come = [int(died[label]) for label in group.classes if live[label] and not low[label]]
        stay_away = [int(died[label]) for label in group.classes if not live[label]]
        assert not come or not stay_away or min(come) > max(stay_away)
        checked += bool(come and stay_away)
    assert checked > 3 and len(set(died.tolist())) > 4


def test_subnets_that_are_not_nested_lose_channels_on_the_way_too():
    model, example = small_net()
    channel_map = analyse(model, (example,)).channel_map
    draw = torch.Generator().manual_seed(0)
    ends = [
        Neighbour(torch.rand(channel_map.size, generator=draw) < share, torch.zeros(channel_map.size).long())
        for share in (0.3, 0.7)
    ]
    widths = []
    for most in range(0, channel_map.size, 10):
        live = interpolate(channel_map, *ends, lambda live, most=most: int(live.sum()) <= most)
        assert not (live & ~ends[0].live & ~ends[1].live).any() and not (ends[0].live & ends[1].live & ~live).any()
        widths.append(int(live.sum()))
        assert widths[-1] <= max(most, widths[0])
    assert widths[0] == int(ends[0].live.sum()) and len(set(widths)) > 20
    assert torch.equal(interpolate(channel_map, *ends, lambda live: True), ends[1].live)


def test_a_trained_subnet_that_is_near_is_taken_and_a_width_is_made_once(switchable):
    model, _ = switchable
    rows = subnets.status(model).rows
    assert subnets.switch(model, flops=rows[1].structure.shares["FLOPs"] + 0.004, between=True) == rows[1].structure
    first = subnets.switch(model, flops=0.3, between=True)
    subnets.switch(model, 0)
    assert subnets.switch(model, flops=0.3, between=True) == first
    assert subnets.switch(model, first.name) == first
    assert subnets.switch(model, flops=0.3) == rows[0].structure
    assert [row.active for row in subnets.status(model).rows] == [True, False, False, False]
    assert [one.number for one in subnets.each(model)] == [2, 1, 0]
    assert subnets.switch(model, params=0.5, between=True).shares["parameters"] <= 0.5


def test_norms_are_recalibrated_before_it_is_taken_out(switchable):
    model, example = switchable
    name = subnets.switch(model, flops=0.25, between=True).name
    assert "not recalibrated" in str(subnets.status(model))
    with pytest.warns(UserWarning, match="never recalibrated"):
        subnets.extract(model, name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    autogate.recalibrate(model, [example, example + 1])
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}
    assert changed and all(key.startswith(f"{SUBNETS}.3.") for key in changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim = subnets.extract(model, name)
    with torch.no_grad():
        assert torch.equal(slim(example), model(example))


def test_norms_start_between_their_neighbours(switchable):
    model, _ = switchable
    with torch.no_grad():
        for number, value in ((0, 1.0), (1, 3.0)):
            for one in model._modules[SUBNETS].subnets[number].own:
                one.at.own().fill_(value)
    subnets.switch(model, flops=0.25, between=True)
    own = model._modules[SUBNETS].subnet.own
    values = torch.cat([one.at.own().flatten() for one in own if one.at.own().ndim]).unique()
    assert set(values.tolist()) <= {2.0, 3.0} and 2.0 in values and 3.0 in values


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_have_it(switchable, way):
    model, example = switchable
    made = subnets.switch(model, flops=0.25, between=True)
    copied = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(copied(example), model(example))
    assert subnets.status(copied).rows[-1].structure == made and not subnets.status(copied).rows[-1].calibrated


def test_latency_and_widths_that_cannot_be_made_are_told_of(switchable):
    model, _ = switchable
    for call, message in (
        (lambda: subnets.switch(model, latency=0.5, between=True), "known only once it was made"),
        (lambda: subnets.switch(model, flops=0.01, between=True), "no subnet fits 1.0% .*The smallest, '0.1'"),
        (lambda: subnets.switch(model, "0.1", between=True), "both '0.1' and a share"),
    ):
        with pytest.raises(autogate.AutogateError, match=f"(?s){message}"):
            call()
    assert subnets.switch(model, flops=1.0, between=True).name == "full"
