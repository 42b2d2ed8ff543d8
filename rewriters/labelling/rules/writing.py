"""Ops that write elements into a tensor: at indexed positions, under a mask, into a slice.

They merge labels along the dimensions that aren't indexed. Along the others labels are pinned, because a position among
fewer has another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rewriters.labelling.labels import Labelled
from rewriters.labelling.rules.elementwise import meet
from rewriters.labelling.rules.registry import OpCall, Result, find_rule, rule, unknown

_REASON = "written to at indexed positions"


@rule("aten.index_put", "aten.index_put_", "aten._unsafe_index_put")
def index_put(call: OpCall) -> Result:
    """x[i, :, j] = written, x[mask] = a number: along dimensions that aren't indexed, labels meet those written.

    A mask under which one number is written meets the dimensions that it covers, position by position. Any other key
    picks positions by their numbers, or by how many there are, so all that it could pick are pinned.
    """
    value, keys, written = call.args[:3]
    given = [key for key in keys if key is not None]
    if any(key.boolean and not key.ndim for key in given):  # a single bool: all or nothing, along a new dimension
        return unknown(call)
    indexed = _indexed(value.ndim, keys)
    written = _as_wide(written, indexed.ndim - written.ndim, indexed.ndim)
    masked = len(given) == 1 and given[0].boolean and all(written.shape[dim] == 1 for dim in indexed.found)
    if masked:
        operands = [value, _as_wide(given[0], indexed.covered[0], value.ndim)]
    else:
        for layer in (layer for key in given for layer in key.layers):
            call.pin(layer, "used as indices")
        operands = [Labelled(value.shape, call.mix(value, indexed.covered, _REASON))]
    layers = [layer.reshape(indexed.at_home(layer.shape)) for layer in call.mix(written, indexed.found, _REASON)]
    operands.append(Labelled(tuple(indexed.at_home(written.shape)), tuple(layers)))
    return Labelled(call.shape, meet(call, operands))


@dataclass(frozen=True)
class _Indexed:
    """Which dimensions the keys of x[keys] cover.

    Attributes:
        rest: dimensions of the tensor that aren't indexed.
        covered: those that are.
        found: dimensions of x[keys] that these have become.
    """

    rest: list[int]
    covered: list[int]
    found: range

    @property
    def ndim(self) -> int:
        """Dimensions of x[keys]."""
        return len(self.rest) + len(self.found)

    def at_home(self, shape: Sequence[int]) -> list[int]:
        """Sizes of x[keys] along the dimensions of x, 1 along those that are indexed."""
        own = dict(zip(self.rest, (size for dim, size in enumerate(shape) if dim not in self.found), strict=True))
        return [own.get(dim, 1) for dim in range(len(self.rest) + len(self.covered))]


def _indexed(ndim: int, keys: Sequence[Labelled | None]) -> _Indexed:
    """As in PyTorch and NumPy: the indexed dimensions come where the keys are, or first if the keys aren't adjacent."""
    covered: list[int] = []
    dim = 0
    for key in keys:
        over = key.ndim if key is not None and key.boolean else 1
        covered += range(dim, dim + over) if key is not None else ()
        dim += over
    rest = [dim for dim in range(ndim) if dim not in covered]
    width = max(1 if key.boolean else key.ndim for key in keys if key is not None)
    apart = covered[-1] - covered[0] >= len(covered)
    first = 0 if apart else covered[0]
    return _Indexed(rest, covered, range(first, first + width))


def _as_wide(value: Labelled, first: int, ndim: int) -> Labelled:
    """The value with `ndim` dimensions: its own come from `first` on, the others have size 1."""
    before, behind = (1,) * first, (1,) * (ndim - first - value.ndim)
    layers = tuple(layer.reshape(before + layer.shape + behind) for layer in value.layers)
    return Labelled(before + value.shape + behind, layers)


@rule(
    "aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_", "aten.index_fill", "aten.index_fill_",
    "aten.index_reduce", "aten.index_reduce_",
)  # fmt: skip
def index_write(call: OpCall) -> Labelled:
    """x.index_add(dim, indices, written) and similar ops: one index for all elements at a position along `dim`."""
    value, dim, indices, written = call.args[:4]
    for layer in indices.layers:
        call.pin(layer, "used as indices")
    operands = [value, written] if isinstance(written, Labelled) and written.ndim else [value]
    numbered = {dim % (value.ndim or 1)}
    return Labelled(call.shape, meet(call, [_mixed(call, operand, numbered) for operand in operands]))


@rule(
    "aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.scatter_add_", "aten.scatter_reduce",
    "aten.scatter_reduce_",
)  # fmt: skip
def scatter(call: OpCall) -> Labelled:
    """`gather` backwards: each element has its own index along one dimension; the other dimensions meet.

    Along a dimension where operands have different lengths, positions are known by their numbers too.
    """
    value, dim = call.args[:2]
    operands = [operand for operand in call.tensors() if operand.ndim == value.ndim]
    numbered = {d for d in range(value.ndim) if len({operand.shape[d] for operand in operands}) > 1}
    numbered.add(dim % (value.ndim or 1))
    return Labelled(call.shape, meet(call, [_mixed(call, operand, numbered) for operand in operands]))


def _mixed(call: OpCall, value: Labelled, dims: set[int]) -> Labelled:
    """What survives a mixing along some dimensions, which have size 1 then."""
    layers = call.mix(value, dims, _REASON)
    return Labelled(tuple(1 if dim in dims else size for dim, size in enumerate(value.shape)), layers)


_VIEWS = {
    torch.ops.aten.slice_scatter: torch.ops.aten.slice.Tensor,
    torch.ops.aten.select_scatter: torch.ops.aten.select.int,
    torch.ops.aten.diagonal_scatter: torch.ops.aten.diagonal.default,
}


@rule("aten.slice_scatter", "aten.select_scatter", "aten.diagonal_scatter")
def write_to_view(call: OpCall) -> Labelled:
    """x.slice_scatter(written, ...) and similar ops: a copy of x with one slice replaced."""
    value, written, *place = call.args
    view = _VIEWS[call.op.overloadpacket]
    at = replace(call, op=view, args=(value, *place), shapes=[written.shape])
    part = find_rule(view)(at)
    assert isinstance(part, Labelled)
    meet(at, [part, written])
    return Labelled(call.shape, value.layers)
