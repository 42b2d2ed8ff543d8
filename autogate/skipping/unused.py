"""Channels that no image uses: found on batches, and removed from a model and from its saliency modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autogate.saliency import (
    NAME,
    SALIENCY,
    CountedLayer,
    FollowingModule,
    SaliencyBank,
    SaliencyModule,
    classes_of,
    costs,
    nonzero_when_off,
)
from autogate.slim import KeptIndices, analyse_channels, form_of, kept_by_side, slim_and_record
from rewriters import ALWAYS, Analysis, AutogateError, ChannelMap, Kernel, Side, UndoLog

CLOSED = -1e4
"""A score that no threshold lets through."""


def used_classes(model: nn.Module, bank: SaliencyBank, batches: Iterable[Any]) -> Tensor:
    """The classes of channels that some image of these batches uses, bool, shape (classes,).

    Raises:
        AutogateError: there are no batches, or scores are NaN or infinite.
    """
    used = torch.zeros(len(bank.counting.zero) + 1, dtype=torch.bool)
    for _ in costs(model, bank, batches):
        for call in bank.notes.calls:
            if call.made is not None:
                made = call.made.reshape(-1, call.made.shape[-1]).any(0).cpu()
                used[bank.counting.layers[call.layer].outputs[made]] = True
    return used[:-1]


def live_classes(model: nn.Module, bank: SaliencyBank, channel_map: ChannelMap, used: Tensor) -> Tensor:
    """The classes that stay, bool, shape (classes,).

    They are used, or aren't zero where they are off, or statistics across channels are taken over them. Each layer
    keeps a channel.
    """
    made = torch.zeros(len(used) + 1, dtype=torch.bool)
    for layer in bank.counting.layers:
        if layer.kind == "chosen":
            made[layer.outputs] = True
    live = used | ~bank.counting.zero | ~made[:-1] | _read_whole(model, bank, channel_map)
    for statistic in channel_map.statistics:
        live[statistic.classes[statistic.classes != ALWAYS]] = True
    return channel_map.survivors(live)


def _read_whole(model: nn.Module, bank: SaliencyBank, channel_map: ChannelMap) -> Tensor:
    """The classes that layers which run whole read as something else than zero where they are off."""
    reads, makes, kernels, choosing = {}, {}, _kernels(channel_map), set()
    for number, layer in enumerate(bank.counting.layers):
        if layer.kind == "chosen":
            makes[number] = layer.outputs
        if layer.kind != "whole":
            choosing.add(layer.path)
        elif layer.groups == 1 and layer.path in kernels:
            choosing.add(layer.path)
            reads[layer.path] = layer.inputs
    call = bank.origin.calls_for(model)[0]
    found = nonzero_when_off(model, bank.notes, call, reads, makes, channel_map.size)
    for kernel in channel_map.kernels:
        if kernel.module not in choosing or kernels[kernel.module] is not kernel:
            found[classes_of(channel_map, kernel.input_side)] = True
    return found[:-1]


def close(bank: SaliencyBank, live: Tensor, undo_log: UndoLog) -> None:
    """Let no image use the channels of dead classes."""
    stays = torch.cat([live, live.new_ones(1)])
    for module in bank.saliency_modules:
        dead = ~stays[bank.counting.layers[module.layer].outputs]
        for tensor, value in ((module.expand.weight, 0.0), (module.expand.bias, CLOSED)):
            values = tensor.detach().clone()
            values[dead] = value
            undo_log.write(tensor, values)


class Entry(NamedTuple):
    """A child module or a hook, by the dictionary that it is in."""

    entries: dict[Any, Any]
    key: Any
    value: Any


def take_off(model: nn.Module, bank: SaliencyBank, undo_log: UndoLog) -> list[Entry]:
    """Take the saliency modules and their hooks off a model. Returns what to put on again."""
    owners = [model.get_submodule(layer.path) for layer in bank.counting.layers if layer.scaling is not None]
    places: list[tuple[Any, Any]] = [(handle.hooks_dict_ref(), handle.id) for handle in bank.handles]
    places += [(owner._modules, NAME) for owner in owners] + [(model._modules, SALIENCY)]
    taken = [Entry(entries, key, entries[key]) for entries, key in places if entries is not None]
    for one in taken:
        undo_log.remove(one.entries, one.key)
    return taken


def put_on(taken: Iterable[Entry], undo_log: UndoLog) -> None:
    """Put modules and hooks on again."""
    for one in taken:
        undo_log.set(one.entries, one.key, one.value)


def analysed(model: nn.Module, bank: SaliencyBank) -> Analysis:
    """Analyse a model whose saliency modules are off.

    Raises:
        AutogateError: a layer has changed since the model was prepared.
    """
    analysis = analyse_channels(model, bank.origin.options.on(bank.origin.calls_for(model)))
    kernels = _kernels(analysis.channel_map)
    for layer in bank.counting.layers:
        sides = _sides(layer, kernels)
        for side, classes in zip(sides, (layer.inputs, layer.outputs), strict=True):
            if side is not None and not torch.equal(classes_of(analysis.channel_map, side), classes):
                raise AutogateError(
                    "this layer has changed since the model was prepared.",
                    where=layer.path,
                    remedy="Change layers before prepare, or prepare the changed model again.",
                )
    return analysis


def slim(
    model: nn.Module, bank: SaliencyBank, live: Tensor, analysis: Analysis, taken: Iterable[Entry], undo_log: UndoLog
) -> None:
    """Remove the channels of dead classes, which no image uses, from a model and its saliency modules.

    Args:
        model: its saliency modules are off.
        bank: its saliency bank.
        live: the classes that stay, bool, shape (classes,).
        analysis: of the model.
        taken: what was taken off.
        undo_log: takes all changes.
    """
    options = bank.origin.options.on(bank.origin.calls_for(model))
    done = slim_and_record(model, analysis, live, options, (), undo_log, method=repr(bank.run.method))
    kept, kernels = kept_by_side(done.kept), _kernels(analysis.channel_map)
    stay = [_kept(layer, kernels, kept) for layer in bank.counting.layers]
    for module in (one.value for one in taken):
        if isinstance(module, SaliencyModule):
            _slim_module(module, stay[module.layer], undo_log)
        elif isinstance(module, FollowingModule):
            _slim_following(module, stay, undo_log)
    layers = tuple(_slim_layer(model, *one) for one in zip(bank.counting.layers, stay, strict=True))
    counted = {layer.path for layer in layers}
    others = [kernel for kernel in analysis.channel_map.kernels if kernels.get(kernel.module) is not kernel
              or kernel.module not in counted]  # fmt: skip
    rest = sum(analysis.channel_map.macs(kernel, live) for kernel in others)
    counting = bank.counting
    before = counting.rest if counting.prepared_rest is None else counting.prepared_rest
    bank.recount(replace(counting, layers=layers, rest=rest, prepared_rest=before), undo_log)
    undo_log.set_attribute(bank, "form", form_of(model, bank.added))


class _Kept(NamedTuple):
    """Indices of a layer's channels that stay, int64."""

    inputs: Tensor
    outputs: Tensor


def _kernels(channel_map: ChannelMap) -> dict[str, Kernel]:
    """The weights of modules, by the modules' paths."""
    return {one.module: one for one in channel_map.kernels if one.weight == f"{one.module}.weight".lstrip(".")}


def _sides(layer: CountedLayer, kernels: Mapping[str, Kernel]) -> tuple[Side | None, Side | None]:
    """The sides that a layer's inputs and outputs lie on; None where its channels are in groups."""
    kernel = kernels.get(layer.path)
    if kernel is None or (layer.groups > 1 and layer.kind == "whole"):
        return None, None
    return (kernel.output_side if layer.groups > 1 else kernel.input_side), kernel.output_side


def _kept(layer: CountedLayer, kernels: Mapping[str, Kernel], kept: Mapping[Side, KeptIndices]) -> _Kept:
    sides, sizes = _sides(layer, kernels), (len(layer.inputs), len(layer.outputs))
    return _Kept(*(
        torch.tensor(kept[side].kept) if side is not None and side in kept else torch.arange(size)
        for side, size in zip(sides, sizes, strict=True)
    ))  # fmt: skip


def _slim_layer(model: nn.Module, layer: CountedLayer, stay: _Kept) -> CountedLayer:
    """The layer as it is counted with the channels that stay."""
    module: Any = model.get_submodule(layer.path)
    inputs, outputs = layer.inputs[stay.inputs], layer.outputs[stay.outputs]
    if layer.groups > 1 and layer.kind == "whole":
        inputs, outputs = (torch.full((size,), ALWAYS) for size in (module.in_channels, module.out_channels))
    own = 0
    if layer.kind == "chosen":
        own = layer.own * (len(inputs) + len(outputs)) // (len(layer.inputs) + len(layer.outputs))
    prepared = layer.dense / layer.taps
    return replace(
        layer, inputs=inputs, outputs=outputs, own=own, groups=getattr(module, "groups", 1), prepared=prepared
    )


def _slim_module(module: SaliencyModule, stay: _Kept, undo_log: UndoLog) -> None:
    inputs, outputs = (index.to(module.expand.weight.device) for index in stay)
    reduce, expand = module.reduce, module.expand
    for owner, name, dim, index in (
        (reduce, "weight", 1, inputs), (expand, "weight", 0, outputs), (expand, "bias", 0, outputs),
    ):  # fmt: skip
        before = getattr(owner, name)
        sliced = before.detach().index_select(dim, index).clone()
        undo_log.set_tensor(owner, name, nn.Parameter(sliced, before.requires_grad))
    undo_log.set_attribute(module.reduce, "in_features", len(inputs))
    undo_log.set_attribute(module.expand, "out_features", len(outputs))


def _slim_following(module: FollowingModule, stay: Sequence[_Kept], undo_log: UndoLog) -> None:
    own = stay[module.layer].outputs.to(module.places.device)
    found = []
    for source, places in zip(module.sources, module.places[:, own], strict=True):
        kept = stay[source.layer].outputs.to(places.device)
        number = torch.full((int(max(places.max(), kept.max())) + 2,), -1, device=places.device)  # the last: -1 stays
        number[kept] = torch.arange(len(kept), device=places.device)
        found.append(number[places])
    undo_log.set_tensor(module, "places", torch.stack(found))
