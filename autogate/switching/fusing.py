"""Make one switchable network of a model and several structures, and take one subnet out of it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autogate.budget import Flops, Params, Resource
from autogate.inputs import Inputs, dtype_of_parameters
from autogate.slim import (
    AnalysisOptions,
    PrepareRecord,
    add_shortcut_convolutions,
    analyse_channels,
    as_described,
    check_same,
    describe,
    slim_and_record,
    verify,
)
from autogate.switching.bank import SUBNETS, Subnets
from autogate.switching.own_tensors import own_tensors
from autogate.switching.record import Fusing
from autogate.switching.structure import Structure
from autogate.switching.subnet import Subnet
from rewriters import Analysis, AutogateError, ChannelMap, Decisions, Outputs, SlimPlan, UndoLog, plan
from rewriters.recording import tensor_slots
from rewriters.slimming import Overlay, Place, with_all_forwards

FULL = "full"
"""Name of the subnet that is the dense model."""


def fuse(
    model: nn.Module, structures: Sequence[Structure], origin: PrepareRecord, affine: bool,
    undo_log: UndoLog, decided: Sequence[Decisions] | None = None,
) -> Subnets:  # fmt: skip
    """Give a model subnets of these structures.

    Args:
        model: dense, without gates or subnets; changed in place.
        structures: at least one, in any order.
        origin: how the model is analysed.
        affine: whether weights and biases of batch norms are each subnet's own, beside the statistics.
        undo_log: takes changes, also if this raises.
        decided: for each structure, what was read from the weights before; they aren't looked at then.

    Raises:
        AutogateError: a structure belongs to another model, or two have the same name.
    """
    options = origin.options
    shortcuts = add_shortcut_convolutions(model, options, undo_log)
    analysis = analyse_channels(model, options)
    channel_map = analysis.channel_map
    added = {shortcut.weight for shortcut in shortcuts}
    resources = [Flops(channel_map, model, added), Params(channel_map, model, added)]
    wanted = _by_size(structures, decided or [None] * len(structures), channel_map, resources)
    full = _structure(FULL, channel_map, torch.ones(channel_map.size, dtype=torch.bool), resources)
    _check_names([*(one.structure.name for one in wanted), FULL], model)
    plans = [_plan(model, analysis, one, options) for one in wanted]
    overlays = [Overlay.of(model, done, channel_map, one.live) for done, one in zip(plans, wanted, strict=True)]
    *overlays, of_full = with_all_forwards([*overlays, Overlay((), (), ())])
    made = []
    for one, slim_plan, overlay in zip(wanted, plans, overlays, strict=True):
        tree, own = own_tensors(model, overlay, slim_plan.removed, affine)
        made.append((Subnet(one.structure, overlay, own), tree))
    made.append((Subnet(full, of_full, []), nn.Module()))
    before, modules = describe(model, options, shortcuts)
    record = Fusing(
        **vars(before),
        modules=modules,
        structures=tuple(one.structure for one in wanted),
        branches=tuple(slim_plan.decisions.branches for slim_plan in plans),
        affine=affine,
        active=len(wanted),
    )
    subnets = Subnets(made, replace(origin, shortcuts=shortcuts), record)
    subnets.attach(model)
    return subnets


class _Wanted(NamedTuple):
    """A structure, its live classes (bool, shape (classes,)), and what was decided for it before."""

    structure: Structure
    live: Tensor
    decided: Decisions | None


def _by_size(
    structures: Sequence[Structure], decided: Sequence[Decisions | None], channel_map: ChannelMap,
    resources: Sequence[Resource],
) -> list[_Wanted]:  # fmt: skip
    """The structures with their shares in this model, the smallest first."""
    found = []
    for structure, decisions in zip(structures, decided, strict=True):
        live = structure.live(channel_map)
        found.append(_Wanted(_structure(structure.name, channel_map, live, resources), live, decisions))
    return sorted(found, key=lambda one: tuple(one.structure.shares.values()))


def _structure(name: str, channel_map: ChannelMap, live: Tensor, resources: Sequence[Resource]) -> Structure:
    return Structure.of(name, channel_map, live, {one.name: one.share(live) for one in resources})


def _check_names(names: Sequence[str], model: nn.Module) -> None:
    for name in names:
        if names.count(name) > 1:
            raise AutogateError(
                f"two subnets are called {name!r}.", where=type(model).__name__, remedy="Give each a name of its own."
            )


def fuse_again(model: nn.Module, record: Fusing, calls: Sequence[Inputs], undo_log: UndoLog) -> Subnets:
    """Give `model` subnets as a record says.

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
    decided = [Decisions(branches=one) for one in record.branches]
    subnets = fuse(model, record.structures, origin, record.affine, undo_log, decided)
    try:
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


def _plan(model: nn.Module, analysis: Analysis, wanted: _Wanted, options: AnalysisOptions) -> SlimPlan:
    if wanted.decided is not None:
        return plan(model, analysis, wanted.live, *options.inputs, wanted.decided)
    with dead_columns_closed(model, analysis.channel_map, wanted.live):
        return plan(model, analysis, wanted.live, *options.inputs)


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
    for name, columns in channel_map.open_columns(live).items():
        tensor = by_name[name]
        for own_dim, is_open in columns:
            shape = [-1 if dim == own_dim else 1 for dim in range(tensor.ndim)]
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
    with subnets.switched(model, index):
        calls = subnets.origin.calls_for(model)
        wanted = [Outputs.of(model, *call) for call in calls]
        copied = copy.deepcopy(model)
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
