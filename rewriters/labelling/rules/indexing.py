"""Ops that pick elements by tensors of indices: tables of relative positions, embeddings.

The dimensions that aren't indexed keep their labels: a table of relative positions keeps one for each head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriters.labelling.labels import Labelled, varying
from rewriters.labelling.rules.elementwise import meet
from rewriters.labelling.rules.registry import OpCall, Result, rule

_REASON = "picked by a tensor of indices"


@rule("aten.index.Tensor")
def index(call: OpCall) -> Labelled:
    """table[i, :, j]: labels survive along the dimensions that are not indexed."""
    value, keys = call.args
    return _picked(call, value, list(keys))


@rule("aten.index_select")
def index_select(call: OpCall) -> Labelled:
    """table.index_select(dim, indices)."""
    value, dim, indices = call.args
    return _picked(call, value, [*[None] * (dim % value.ndim), indices])


@rule("aten.embedding")
def embedding(call: OpCall) -> Labelled:
    """table[indices]."""
    return _picked(call, call.args[0], [call.args[1]])


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: OpCall) -> Result:
    """Sums, means or maxima of the rows that each bag picks from a table."""
    table, *others = call.args
    for value in (value for value in others if isinstance(value, Labelled)):
        call.mix(value, range(value.ndim), "used as indices, or to weight the rows of a bag")
    layers = call.mix(table, [0], _REASON)
    return [Labelled(shape, layers if index == 0 else ()) for index, shape in enumerate(call.shapes)]


@rule("aten.gather")
def gather(call: OpCall) -> Labelled:
    """Pick an element along one dimension for each position: the tensor of indices is as large as the result.

    If the indices were expanded along the channels, their labels there belong to no layer and are merged with these.
    """
    value, dim, indices = call.args[:3]
    whole = [d for d in range(value.ndim) if d == dim % value.ndim or indices.shape[d] < value.shape[d]]
    return Labelled(call.shape, meet(call, [Labelled(call.shape, call.mix(value, whole, _REASON)), indices]))


def _picked(call: OpCall, value: Labelled, keys: list[Any]) -> Labelled:
    """Labels of value[keys]. Which indices are picked isn't known here, so indexed dimensions count as mixed."""
    for key in keys:
        for layer in key.layers if isinstance(key, Labelled) else ():
            call.pin(layer, "used as indices")
    dims = [dim for dim, key in enumerate(keys) if key is not None]
    # One index, at 0: each layer that is left is the same along the indexed dimensions.
    zeros = [None if key is None else torch.zeros((1,) * len(key.shape), dtype=torch.int64) for key in keys]
    layers = []
    for layer in call.mix(value, dims, _REASON):
        picked: Tensor = torch.ops.aten.index.Tensor(layer, zeros)
        if varying(picked):
            layers.append(picked)
    return Labelled(call.shape, tuple(layers))
