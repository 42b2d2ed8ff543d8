"""Make one switchable network of a model and several structures, and take one subnet out of it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from autogate.budget import Flops, Params
from autogate.slim import (
    AnalysisOptions,
    PrepareRecord,
    add_shortcut_convolutions,
    analyse_channels,
    slim_and_record,
    verify,
)
from autogate.switching.bank import SUBNETS, Subnets
from autogate.switching.own_tensors import own_tensors
from autogate.switching.structure import Structure
from autogate.switching.subnet import Subnet
from rewriters import Analysis, AutogateError, ChannelMap, Outputs, SlimPlan, UndoLog, plan
from rewriters.slimming import Overlay, Place, tensor_slots, with_all_forwards

FULL = "full"
"""Name of the subnet that is the dense model."""


def fuse(model: nn.Module, structures: Sequence[Structure], origin: PrepareRecord, affine: bool) -> Subnets:
    """Give a model subnets of these structures.

    Args:
        model: dense, without gates or subnets; changed in place.
        structures: at least one, in any order.
        origin: how the model is analysed.
        affine: whether weights and biases of batch norms are each subnet's own, beside the statistics.

    Raises:
        AutogateError: a structure belongs to another model, or two have the same name. The model is left as it was.
    """
    undo_log, options = UndoLog(), origin.options
    try:
        shortcuts = add_shortcut_convolutions(model, options, undo_log)
        analysis = analyse_channels(model, options)
        channel_map = analysis.channel_map
        added = {shortcut.weight for shortcut in shortcuts}
        resources = [Flops(channel_map, model, added), Params(channel_map, model, added)]
        lives = [one.live(channel_map) for one in structures]
        shares = [{one.name: one.share(live) for one in resources} for live in lives]
        order = sorted(range(len(structures)), key=lambda i: tuple(shares[i].values()))
        named = [Structure(structures[i].name, structures[i].kept, shares[i]) for i in order]
        _check_names([*(one.name for one in named), FULL], model)
        everything = torch.ones(channel_map.size, dtype=torch.bool)
        full = Structure.of(FULL, channel_map, everything, {one.name: one.share(everything) for one in resources})
        plans = [_plan(model, analysis, lives[i], options) for i in order]
        overlays = [Overlay.of(model, one, channel_map, lives[i]) for one, i in zip(plans, order, strict=True)]
        *overlays, of_full = with_all_forwards([*overlays, Overlay((), (), ())])
        made = []
        for structure, slim_plan, overlay in zip(named, plans, overlays, strict=True):
            tree, own = own_tensors(model, overlay, slim_plan.removed, affine)
            made.append((Subnet(structure, overlay, own), tree))
    except BaseException:
        undo_log.undo()
        raise
    subnets = Subnets([*made, (Subnet(full, of_full, []), nn.Module())], replace(origin, shortcuts=shortcuts))
    subnets.attach(model)
    return subnets


def _check_names(names: Sequence[str], model: nn.Module) -> None:
    for name in names:
        if names.count(name) > 1:
            raise AutogateError(
                f"two subnets are called {name!r}.", where=type(model).__name__, remedy="Give each a name of its own."
            )


def _plan(model: nn.Module, analysis: Analysis, live: Tensor, options: AnalysisOptions) -> SlimPlan:
    with dead_columns_closed(model, analysis.channel_map, live):
        return plan(model, analysis, live, *options.inputs)


@contextmanager
def dead_columns_closed(model: nn.Module, channel_map: ChannelMap, live: Tensor) -> Iterator[None]:
    """Inside, the columns of dead classes are zero in every kernel, as behind gates that are closed."""
    undo_log = UndoLog()
    try:
        close_columns(model, channel_map, live, undo_log)
        yield
    finally:
        undo_log.undo()


def close_columns(model: nn.Module, channel_map: ChannelMap, live: Tensor, undo_log: UndoLog) -> None:
    """Put kernels in the model whose columns of dead classes are zero.

    Args:
        model: its parameters are exchanged.
        channel_map: its channels.
        live: the classes that live, bool, shape (classes,).
        undo_log: notes every change.
    """
    places: dict[int, list[Place]] = {}
    by_name: dict[str, Tensor] = {}
    for name, module, own_name, tensor in tensor_slots(model):
        places.setdefault(id(tensor), []).append(Place(module, own_name))
        by_name[name] = tensor
    closed: dict[int, Tensor] = {}
    for side in channel_map.gated:
        tensor = by_name[side.tensor]
        is_open = torch.cat([live, live.new_ones(1)])[channel_map.classes[side]]
        if not is_open.all():
            shape = [-1 if dim == side.dim else 1 for dim in range(tensor.ndim)]
            before = closed.get(id(tensor), tensor.detach())
            closed[id(tensor)] = before * is_open.to(before).view(shape)
    for key, value in closed.items():
        parameter = nn.Parameter(value, requires_grad=places[key][0].own().requires_grad)
        for place in places[key]:
            undo_log.set_tensor(place.module, place.name, parameter)


def extract(model: nn.Module, subnets: Subnets, index: int) -> nn.Module:
    """A subnet as a slim model of its own, which shares nothing with the switchable one.

    Args:
        model: has the subnets; left as it was.
        subnets: the model's.
        index: which of them.

    Raises:
        VerificationError: its outputs aren't those of the subnet.
    """
    before = subnets.active
    subnets.switch(model, index)
    try:
        calls = subnets.origin.calls_for(model)
        wanted = [Outputs.of(model, *call) for call in calls]
        copied = copy.deepcopy(model)
    finally:
        subnets.switch(model, before)
    own: Subnets = copied._modules[SUBNETS]  # type: ignore[assignment]
    subnet = own.subnet
    own.detach(copied)
    if index == own.full:
        return copied
    undo_log = UndoLog()
    options = own.origin.options.on(calls)
    analysis = analyse_channels(copied, options)
    live = subnet.structure.live(analysis.channel_map)
    _write_own(subnet)
    close_columns(copied, analysis.channel_map, live, undo_log)
    slim_and_record(copied, analysis, live, options, own.origin.shortcuts, undo_log)
    _write_constants(copied, subnet)
    for call, outputs in zip(calls, wanted, strict=True):
        verify(copied, call, outputs, f"the subnet {subnet.structure.name!r}")
    return copied


@torch.no_grad()
def _write_own(subnet: Subnet) -> None:
    """Write the subnet's own tensors into the dense ones that they are slices of."""
    cuts = {place: one.cuts for one in subnet.overlay.slices for place in one.places}
    for one in subnet.own:
        place, value = one.places[0], one.at.own()
        if place.owns:  # not a constant, which the dense model doesn't have
            dense, kept = place.own(), dict(cuts.get(place, ()))
            indices = [kept.get(dim, torch.arange(size)).to(dense.device) for dim, size in enumerate(dense.shape)]
            dense[torch.meshgrid(*indices, indexing="ij") if indices else ...] = value


@torch.no_grad()
def _write_constants(model: nn.Module, subnet: Subnet) -> None:
    """Write the subnet's constants, in place of branches without channels, over those that slimming computed."""
    for name, _, _ in subnet.overlay.constants:
        (own,) = (one for one in subnet.own if one.name == name)
        path, _, own_name = name.rpartition(".")
        model.get_submodule(path).get_buffer(own_name).copy_(own.at.own())
