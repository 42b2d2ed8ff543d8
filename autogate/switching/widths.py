"""Widths between two subnets, which were never trained (Yang et al., section V.A).

In every group of channels the same part of the way from the narrower neighbour to the wider one is gone. The channels
that come are those that died last on the way to the narrower one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autogate.budget import Resource
from autogate.inputs import Inputs, dtype_of_parameters
from autogate.slim import PrepareRecord, analyse_channels, as_described, check_same
from autogate.switching.bank import Subnets
from autogate.switching.fusing import Wanted, fuse, make_subnet, resources_of, shares_of
from autogate.switching.record import Fusing
from autogate.switching.structure import Structure
from autogate.switching.subnet import Subnet
from rewriters import Analysis, ChannelMap, Decisions, UndoLog


def add_between(model: nn.Module, subnets: Subnets, limits: Mapping[str, float]) -> int:
    """Make the width that comes nearest to a budget from below, and add it to a model's subnets.

    Args:
        model: has the subnets.
        subnets: the model's; the smallest fits the limits, and the dense model doesn't.
        limits: the share that the width may have of each resource, by its name.

    Returns:
        The width's number; that of an earlier one if it is the same.

    Raises:
        AutogateError: a forward is running.
    """
    with subnets.taken_off(model):
        options = subnets.origin.options.on(subnets.origin.calls_for(model))
        analysis = analyse_channels(model, options)
        resources = resources_of(model, analysis.channel_map, subnets.origin.shortcuts)
        trained = [subnet.structure for subnet in subnets.subnets[: subnets.full + 1]]
        narrower = max(
            number for number, one in enumerate(trained) if all(one.shares[name] <= limits[name] for name in limits)
        )
        ends = [Neighbour.of(trained[number], analysis.channel_map) for number in (narrower, narrower + 1)]
        live = interpolate(analysis.channel_map, ends[0], ends[1], lambda live: _fits(live, resources, limits))
        structure = _named(live, analysis.channel_map, resources, subnets)
        same = [number for number, one in enumerate(subnets.subnets) if one.structure.kept == structure.kept]
        return same[0] if same else _add_width(model, subnets, Wanted(structure, live), analysis)


def fuse_again(model: nn.Module, record: Fusing, calls: Sequence[Inputs], undo_log: UndoLog) -> Subnets:
    """Give `model` subnets as a record says, without a look at its weights.

    Args:
        model: a model like the one that had them, apart from its weights.
        record: the record.
        calls: example inputs on the model's device, all those that `prepare` got.
        undo_log: takes changes, also if this raises.

    Raises:
        AutogateError: it is another model, or its channels are coupled in another way.
    """
    options = as_described(model, record, calls, undo_log)
    origin = PrepareRecord(options, dtype_of_parameters(model))
    count = len(record.structures)
    decided = [Decisions(branches=one) for one in record.branches]
    subnets = fuse(model, record.structures, origin, record.sharing, undo_log, decided[:count])
    try:
        if record.widths:
            _add_recorded(model, subnets, record, decided[count:])
        made = subnets.record
        check_same("the set of convolutions on shortcuts", made.convolutions, record.convolutions)
        for mine, theirs in zip(made.structures, record.structures, strict=True):
            check_same("the set of subnets", mine.name, theirs.name)
        check_same("the set of removed branches", made.branches, record.branches)
        subnets.switch(model, record.active)
    except BaseException:
        subnets.detach(model)
        raise
    return subnets


def _add_recorded(model: nn.Module, subnets: Subnets, record: Fusing, decided: Sequence[Decisions]) -> None:
    with subnets.taken_off(model):
        analysis = analyse_channels(model, subnets.origin.options)
        for structure, first, decisions in zip(record.widths, record.first_statistics, decided, strict=True):
            wanted = Wanted(structure, structure.live(analysis.channel_map), decisions)
            number = _add_width(model, subnets, wanted, analysis)
            subnets.subnets[number].first_statistics = first


def _add_width(model: nn.Module, subnets: Subnets, wanted: Wanted, analysis: Analysis) -> int:
    """Add a width to a model's subnets, with norms like its neighbours'; the model is the dense one meanwhile."""
    options = subnets.origin.options.on(subnets.origin.calls_for(model))
    made = make_subnet(model, analysis, wanted, options, subnets.record.sharing)
    trained = subnets.subnets[: subnets.full + 1]
    at = sum(wanted.structure.shares["FLOPs"] > one.structure.shares["FLOPs"] for one in trained)
    narrower, wider = trained[max(0, at - 1)], trained[min(at, subnets.full)]
    _start_norms(made.subnet, narrower, wider)
    made.subnet.first_statistics = made.subnet.statistics()
    return subnets.add(made.subnet, made.tree, made.branches)


class Neighbour(NamedTuple):
    """A subnet beside a width: its classes (bool, shape (classes,)), and when the others died (larger is later)."""

    live: Tensor
    died: Tensor

    @classmethod
    def of(cls, structure: Structure, channel_map: ChannelMap) -> Neighbour:
        """The neighbour that has a structure's channels."""
        return cls(structure.live(channel_map), structure.died(channel_map))


def interpolate(
    channel_map: ChannelMap, narrower: Neighbour, wider: Neighbour, fits: Callable[[Tensor], bool]
) -> Tensor:
    """The classes of the widest network between two others that fits.

    On the way from the narrower one to the wider one, each group gets the classes that it lacks one by one, and loses
    those that only the narrower one has, all groups at the same pace. Where the next step would no longer fit, groups
    may be one class ahead of the others.

    Args:
        channel_map: the groups.
        narrower: fits.
        wider: the other end.
        fits: whether classes (bool, shape (classes,)) keep to the budget.

    Returns:
        bool, shape (classes,).
    """
    steps = sorted(_steps(channel_map, narrower, wider), key=lambda step: (step.way, not step.comes))
    labels = torch.tensor([step.label for step in steps], dtype=torch.int64)
    comes = torch.tensor([step.comes for step in steps], dtype=torch.bool)

    def after(count: int) -> Tensor:
        return narrower.live.index_put((labels[:count],), comes[:count])

    least, most = 0, len(steps)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(after(middle)) else (least, middle - 1)
    live, ahead = after(least), set()
    for step in steps[least:]:
        if step.comes and step.group not in ahead:
            ahead.add(step.group)
            more = live.index_fill(0, torch.tensor([step.label]), True)
            live = more if fits(more) else live
    return live


class _Step(NamedTuple):
    """A class of a group comes or goes, at a part of the way."""

    way: float
    group: int
    label: int
    comes: bool


def _steps(channel_map: ChannelMap, narrower: Neighbour, wider: Neighbour) -> list[_Step]:
    found = []
    for number, group in enumerate(channel_map.groups()):
        come = [label for label in group.classes if wider.live[label] and not narrower.live[label]]
        come.sort(key=lambda label: -int(narrower.died[label]))
        go = [label for label in group.classes if narrower.live[label] and not wider.live[label]]
        go.sort(key=lambda label: int(wider.died[label]))
        for labels, comes in ((come, True), (go, False)):
            found += [_Step((at + 1) / len(labels), number, label, comes) for at, label in enumerate(labels)]
    return found


def _fits(live: Tensor, resources: Sequence[Resource], limits: Mapping[str, float]) -> bool:
    return all(one.share(live) <= limits[one.name] for one in resources if one.name in limits)


def _named(live: Tensor, channel_map: ChannelMap, resources: Sequence[Resource], subnets: Subnets) -> Structure:
    shares = shares_of(live, resources)
    name, taken = f"between {shares['FLOPs']:.4g}", {one.structure.name for one in subnets.subnets}
    name = name if name not in taken else f"{name}, {shares['parameters']:.4g} of the parameters"
    return Structure.of(name, channel_map, live, shares)


@torch.no_grad()
def _start_norms(width: Subnet, narrower: Subnet, wider: Subnet) -> None:
    """Give a width's batch norms the mean of what both neighbours have for a channel, or what one of them has."""
    for one in width.own:
        place = one.places[0]
        if not isinstance(place.module, _NormBase) or not place.owns:
            continue
        value = one.at.own()
        if not value.ndim:
            value.zero_()  # the number of batches
            continue
        dense = place.own()
        spread = [subnet.spread_own(place) for subnet in (narrower, wider)]
        known = torch.stack([at for _, at in spread]).to(dense)
        summed = sum(part * at.to(part) for part, at in spread)
        full = torch.where(known.sum(0) > 0, summed / known.sum(0).clamp(min=1), dense)
        value.copy_(full[width.indices(place).to(full.device)])
