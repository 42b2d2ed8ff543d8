"""Ops that only move data: the op itself runs on the label layers.

A reshape can take labels across the positions of an image and scatter them over several dimensions. At another
resolution it may then couple other channels. So the model is recorded once more, on inputs twice as large, and what
such reshapes take is pinned unless the classes come out the same.

Where heads and the positions of expanded values are flattened into one dimension, the outer labels stay free (the
heads) and the inner ones are pinned.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from rewriters.labelling.labels import Labelled, PinNote, compress, parts, reshaped, varying
from rewriters.labelling.rules.elementwise import join, meet
from rewriters.labelling.rules.registry import OpCall, Result, rule


def _moved(call: OpCall, value: Labelled, results: list[list[Tensor]]) -> Result:
    """Results of a move, from those of each layer (one label tensor for each result)."""
    outs = []
    for index, shape in enumerate(call.shapes):
        if 0 in shape and 0 not in value.shape:
            outs.append(_emptied(value, shape))
            continue
        layers = []
        for before, after in zip(value.layers, results, strict=True):
            layer = compress(after[index])
            if varying(layer):
                layers.append(layer)
            elif varying(before):
                call.pin(layer, "a single channel is picked")
        call.findings.grids.extend(layer for layer in layers if len(varying(layer)) > 1)
        outs.append(Labelled(shape, tuple(layers), value.source, derived=value.derived))
    return outs if len(outs) > 1 or _returns_list(call.op) else outs[0]


def _emptied(value: Labelled, shape: tuple[int, ...]) -> Labelled:
    """An empty slice of a value (x[:, :0]): it keeps the labels along its other dimensions."""
    alike = len(shape) == value.ndim and all(new in (0, old) for new, old in zip(shape, value.shape, strict=True))
    layers = (layer for layer in value.layers if all(shape[dim] for dim in varying(layer)))
    return Labelled(shape, tuple(layers) if alike else (), value.source, derived=value.derived)


def _returns_list(op: Any) -> bool:
    return "[]" in str(op._schema.returns[0].type) or "List" in str(op._schema.returns[0].type)


def _as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


@rule(
    "aten.slice.Tensor", "aten.select.int", "aten.split.Tensor", "aten.split_with_sizes", "aten.unbind.int",
    "aten.squeeze", "aten.squeeze_", "aten.narrow", "aten.diagonal", "aten.unfold", "aten.chunk",
    "aten.repeat_interleave.self_int", "aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.unsafe_split.Tensor",
    "aten.unsafe_split_with_sizes",
)  # fmt: skip
def move(call: OpCall) -> Result:
    """The op itself, run on the label layers."""
    value, rest = call.args[0], call.args[1:]
    results = [_as_list(call.op(layer.expand(value.shape), *rest, **call.kwargs)) for layer in value.layers]
    return _moved(call, value, results)


@rule(
    "aten.permute", "aten.permute_copy", "aten.movedim", "aten.transpose", "aten.transpose_", "aten.t",
    "aten.unsqueeze", "aten.unsqueeze_", "aten.flip", "aten.rot90",
)  # fmt: skip
def reorder(call: OpCall) -> Result:
    """As `move`, for calls that are the same for all sizes."""
    return move(call)


@rule("aten.roll")
def roll(call: OpCall) -> Result:
    """As `move`, but labels aren't repeated along dimensions that they don't vary in."""
    value, shifts, dims = call.args[0], call.arg(1, "shifts"), call.arg(2, "dims", ())
    if not dims:  # the flattened tensor
        return move(call)
    return _moved(call, value, [[layer.roll(shifts, dims)] for layer in value.layers])


@rule("aten.expand", "aten.repeat")
def expand(call: OpCall) -> Labelled:
    """As `move`; a repeated dimension gets labels that belong to no layer and are removed with those that they meet."""
    moved = _one(move(call))
    before = (1,) * (moved.ndim - call.args[0].ndim) + call.args[0].shape
    repeated = [dim for dim, size in enumerate(moved.shape) if before[dim] == 1 < size]
    own = [call.space.fresh_along(moved.shape, dim) for dim in repeated]
    return replace(moved, layers=(*moved.layers, *own))


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(call: OpCall) -> Result:
    """As `move`; all groups must stay equally wide, so whole groups die, or the same positions in all."""
    value, groups = call.args[0], call.arg(1, "groups")
    along = value.layer(1)
    if along is not None:
        call.findings.grids.append(along.movedim(1, -1).unflatten(-1, (groups, -1)))
    return move(call)


@rule("aten.view.default", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias", "aten.unflatten")
def reshape(call: OpCall) -> Result:
    """As `move`; label layers, unlike the data, may need a copy to be reshaped."""
    value = call.args[0]
    results = [[reshaped(layer, value.shape, call.shape)] for layer in value.layers]
    for layer, (result,) in zip(value.layers, results, strict=True):
        if _scatters(layer, result, value.shape):
            reason = "the size of its input decides which channels are coupled"
            call.findings.scattered.append(PinNote(layer.flatten(), call.module, str(call.op), reason))
    moved = _one(_moved(call, value, results))
    if value.source is not None and any(_several_owned(call, moved, dim) for dim in range(moved.ndim)):
        value = call.without_positions(value)
        results = [[reshaped(layer, value.shape, call.shape)] for layer in value.layers]
        moved = _one(_moved(call, value, results))
    return _apart(call, moved)


def _scatters(before: Tensor, after: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a reshape takes labels across dimensions that they don't vary in, and scatters them over several.

    It does if (positions, channels) is viewed as (channels, height, width) without a transpose in between.

    Args:
        before: labels of a tensor, of size 1 where they don't vary.
        after: labels of the reshaped tensor.
        shape: the tensor's shape.
    """
    for old, new in parts(shape, after.shape):
        repeated = prod(shape[old]) > before.shape[old].numel() > 1
        if sum(size > 1 for size in after.shape[new]) > 1 and (repeated or _repeats_itself(before, old)):
            varies = varying(compress(after))
            if sum(dim in varies for dim in range(after.ndim)[new]) > 1:
                return True
    return False


def _repeats_itself(labels: Tensor, dims: slice) -> bool:
    """Whether labels that vary in these dimensions only occur more than once."""
    return labels.numel() == labels.shape[dims].numel() > len(labels.unique()) > 1


def _one(result: Result) -> Labelled:
    assert isinstance(result, Labelled)
    return result


def _along(value: Labelled, dim: int) -> list[Tensor]:
    return [layer for layer in value.layers if layer.shape[dim] > 1]


def _several_owned(call: OpCall, value: Labelled, dim: int) -> bool:
    layers = _along(value, dim)
    return len(layers) > 1 and sum(map(call.space.owned, layers)) > 1


def _apart(call: OpCall, value: Labelled) -> Labelled:
    """Pin all but one of several labelled dimensions that are flattened into one, whose index can't tell them apart.

    The outermost one among those of a parameter stays free.
    """
    for dim in range(value.ndim):
        layers = _along(value, dim)
        if len(layers) > 1:
            kept = max(layers, key=lambda layer: (call.space.owned(layer), _repeats(layer, dim)))
            for layer in layers:
                if layer is not kept:
                    call.pin(layer, "two labelled dimensions are flattened into one")
            rest = tuple(layer for layer in value.layers if layer is kept or layer.shape[dim] == 1)
            return _apart(call, replace(value, layers=rest))
    return value


def _repeats(layer: Tensor, dim: int) -> int:
    """How often the first label along a dimension repeats before another label comes."""
    along = layer.movedim(dim, 0).reshape(layer.shape[dim], -1)
    return int((along != along[0]).any(1).nonzero()[0])


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(call: OpCall) -> Labelled:
    """Labels are concatenated along `dim` and merged along the others."""
    # torch accepts an empty tensor of shape (0,) among the operands
    values = [value for value in call.args[0] if value.shape != (0,)]
    dim = call.arg(1, "dim", 0) % len(call.shape)
    across = []
    for value in values:
        rest = tuple(other for other in value.layers if other.shape[dim] == 1)
        across.append(Labelled(tuple(1 if d == dim else s for d, s in enumerate(value.shape)), rest))
    along = [(value.shape[dim], value.layer(dim)) for value in values]
    layers = list(meet(call, across))
    if any(layer is not None for _, layer in along):
        joined = _concatenate(call, along, dim)
        if len(varying(joined)) > 1:
            call.findings.grids.append(joined)
        layers = join(call, layers, joined, defer=True)
    return Labelled(call.shape, tuple(layers))


def _concatenate(call: OpCall, along: list[tuple[int, Tensor | None]], dim: int) -> Tensor:
    parts = []
    for size, layer in along:
        if layer is None:  # these channels belong to no layer: they stay
            layer = call.space.fresh(size).view([size if d == dim else 1 for d in range(len(call.shape))])
            call.pin(layer, "concatenated with channels that no layer owns")
        parts.append(layer)
    # Where they vary along other dimensions too (the heads of values that are rotated by halves), they still do.
    others = [max(part.shape[d] for part in parts) for d in range(len(call.shape))]
    wide = [part.expand([part.shape[d] if d == dim else size for d, size in enumerate(others)]) for part in parts]
    return torch.cat(wide, dim)


@rule("aten.stack")
def stack(call: OpCall) -> Labelled:
    """A new dimension, across which the labels of the operands are merged."""
    dim = call.arg(1, "dim", 0) % len(call.shape)
    lifted = []
    for value in call.args[0]:
        shape = (*value.shape[:dim], 1, *value.shape[dim:])
        lifted.append(Labelled(shape, tuple(layer.unsqueeze(dim) for layer in value.layers)))
    return Labelled(call.shape, meet(call, lifted))


@rule("aten.constant_pad_nd")
def pad(call: OpCall) -> Labelled:
    """Padding along a labelled dimension adds channels with new labels, which can be removed like any other."""
    value, widths = call.args[0], call.args[1]
    layers = []
    for layer in value.layers:
        for dim in varying(layer):
            place = 2 * (value.ndim - 1 - dim)
            before, after = widths[place : place + 2] if place < len(widths) else (0, 0)
            if before or after:
                layer = _pad_layer(call, layer, dim, before, after)
        layers.append(layer)
    return Labelled(call.shape, tuple(layers))


def _pad_layer(call: OpCall, layer: Tensor, dim: int, before: int, after: int) -> Tensor:
    inner = layer.narrow(dim, max(-before, 0), layer.shape[dim] - max(-before, 0) - max(-after, 0))

    def border(width: int) -> Tensor:
        shape = [max(width, 0) if d == dim else size for d, size in enumerate(layer.shape)]
        return call.space.fresh(prod(shape)).view(shape)

    return torch.cat([border(before), inner, border(after)], dim)


RULES_THAT_MOVE = (move, reorder, roll, expand, reshape, channel_shuffle, cat, stack)
"""The rules of ops that only move elements and compute nothing."""
