"""Make one switchable network of a model and several structures, and take one subnet out of it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autogate.budget import Flops, Params, Resource
from autogate.slim import (
    AnalysisOptions,
    PrepareRecord,
    add_shortcut_convolutions,
    analyse_channels,
    describe,
    slim_and_record,
    verify,
)
from autogate.switching.bank import SUBNETS, Subnets
from autogate.switching.nesting import in_order
from autogate.switching.own_tensors import own_tensors
from autogate.switching.record import Fusing, Sharing
from autogate.switching.structure import Structure
from autogate.switching.subnet import Subnet
from rewriters import Analysis, AutogateError, ChannelMap, Decisions, Outputs, Shortcut, SlimPlan, UndoLog, plan
from rewriters.recording import tensor_slots
from rewriters.slimming import Overlay, Place

FULL = "full"
"""Name of the subnet that is the dense model."""


def fuse(
    model: nn.Module, structures: Sequence[Structure], origin: PrepareRecord, sharing: Sharing,
    undo_log: UndoLog, decided: Sequence[Decisions] | None = None,
) -> Subnets:  # fmt: skip
    """Give a model subnets of these structures.

    Args:
        model: dense, without gates or subnets; changed in place.
        structures: at least one, in any order.
        origin: how the model is analysed.
        sharing: what subnets have for themselves, and how slices are kept.
        undo_log: takes changes, also if this raises.
        decided: for each structure, what was read from the weights before. Then they aren't looked at, and channels are
            in order already.

    Raises:
        AutogateError: a structure belongs to another model, two have the same name, or they aren't nested as they
            should be.
    """
    options = origin.options
    shortcuts = add_shortcut_convolutions(model, options, undo_log).shortcuts
    analysis = analyse_channels(model, options)
    channel_map = analysis.channel_map
    resources = resources_of(model, channel_map, shortcuts)
    wanted = _by_size(structures, decided or [None] * len(structures), channel_map, resources)
    everything = torch.ones(channel_map.size, dtype=torch.bool)
    full = Structure.of(FULL, channel_map, everything, shares_of(everything, resources))
    _check_names([*(one.structure.name for one in wanted), FULL], model)
    if sharing.nested and decided is None:
        ordered = in_order(model, analysis, [one.structure for one in wanted], options, undo_log)
        wanted = [Wanted(one, one.live(channel_map)) for one in ordered]
    made = [make_subnet(model, analysis, one, options, sharing) for one in wanted]
    of_full = Subnet(full, Overlay((), (), ()), [])
    before, modules = describe(model, options, shortcuts)
    record = Fusing(
        **vars(before),
        modules=modules,
        structures=tuple(one.structure for one in wanted),
        branches=tuple(one.branches for one in made),
        sharing=sharing,
        active=len(wanted),
    )
    held = [*((one.subnet, one.tree) for one in made), (of_full, nn.Module())]
    subnets = Subnets(held, replace(origin, shortcuts=shortcuts), record)
    subnets.attach(model)
    return subnets


class Made(NamedTuple):
    """A subnet, the tree of its own tensors, and what was decided of its dead branches."""

    subnet: Subnet
    tree: nn.Module
    branches: Mapping[str, tuple[bool, ...]]


class Wanted(NamedTuple):
    """A structure, its live classes (bool, shape (classes,)), and what was decided for it before."""

    structure: Structure
    live: Tensor
    decided: Decisions | None = None


def make_subnet(
    model: nn.Module, analysis: Analysis, wanted: Wanted, options: AnalysisOptions, sharing: Sharing
) -> Made:  # fmt: skip
    """Make a subnet of a dense model, which is left as it was.

    Args:
        model: the dense model.
        analysis: its channels.
        wanted: the subnet's structure.
        options: how the model was analysed.
        sharing: what it has for itself, and how slices are kept.
    """
    slim_plan = _plan(model, analysis, wanted, options)
    overlay = Overlay.of(model, slim_plan, sharing.nested)
    tree, own = own_tensors(model, overlay, slim_plan.removed, sharing.affine)
    return Made(Subnet(wanted.structure, overlay, own), tree, slim_plan.decisions.branches)


def _by_size(
    structures: Sequence[Structure], decided: Sequence[Decisions | None], channel_map: ChannelMap,
    resources: Sequence[Resource],
) -> list[Wanted]:  # fmt: skip
    """The structures with their shares in this model, the smallest first."""
    found = []
    for structure, decisions in zip(structures, decided, strict=True):
        live = structure.live(channel_map)
        found.append(Wanted(replace(structure, shares=shares_of(live, resources)), live, decisions))
    return sorted(found, key=lambda one: tuple(one.structure.shares.values()))


def resources_of(model: nn.Module, channel_map: ChannelMap, shortcuts: Sequence[Shortcut]) -> list[Resource]:
    """What the shares of structures are of. Convolutions that were put on shortcuts count in what is left alone."""
    added = {shortcut.weight for shortcut in shortcuts}
    return [Flops(channel_map, model, added), Params(channel_map, model, added)]


def shares_of(live: Tensor, resources: Sequence[Resource]) -> dict[str, float]:
    """The share of each resource that live classes (bool, shape (classes,)) have."""
    return {one.name: one.share(live) for one in resources}


def _check_names(names: Sequence[str], model: nn.Module) -> None:
    for name in names:
        if names.count(name) > 1:
            raise AutogateError(
                f"two subnets are called {name!r}.", where=type(model).__name__, remedy="Give each a name of its own."
            )


def _plan(model: nn.Module, analysis: Analysis, wanted: Wanted, options: AnalysisOptions) -> SlimPlan:
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
