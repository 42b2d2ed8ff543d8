"""Check, index by index, that a call which only moves data does the same to slimmed data.

Moving and then slimming must give the same as slimming and then moving. The check runs on numbers: each combination of
labelled indices has a number, which is repeated along the dimensions without labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from rewriters.forwards.label_mask import SlimShapes, labelled_dims
from rewriters.forwards.sizes import Call
from rewriters.forwards.tracing import run_call
from rewriters.labelling import Labelled, parts, reshaped
from rewriters.labelling.rules import RULES, Rule, elementwise, movement
from rewriters.recording import map_tensors, tensors_of


def _ops_of(*rules: Rule) -> frozenset[Any]:
    return frozenset(op for op, rule in RULES.items() if rule in rules) | elementwise.COPIES


_MOVES, _RESHAPING = _ops_of(*movement.RULES_THAT_MOVE), _ops_of(movement.reshape)


_ROLLING, _ROLLING_OR_JOINING = _ops_of(movement.roll), _ops_of(movement.roll, movement.cat)


_REORDERING = _ops_of(movement.reorder)
"""Ops without a size argument: they move slimmed data as they move whole data."""


_RESHAPES: dict[Any, Any] = {"view": "reshape", "view_as": "reshape_as"}


_TO_SHAPE_OF_ANOTHER = {"view_as", "reshape_as"}
"""Calls that reshape their first operand and take only the shape of their second."""


def swap_tensors(value: Any, others: Mapping[int, Tensor]) -> Any:
    """`value` with each tensor replaced by the one that `others` has for its id."""
    if isinstance(value, Tensor):
        return others[id(value)]
    return map_tensors(lambda tensor: others[id(tensor)], value)


def _numbers(value: Labelled, start: int, dims: slice = slice(None)) -> Tensor:
    """Numbers from `start` on, one for each combination of labelled indices, with size 1 along the other dimensions.

    `dims` restricts them to some of the tensor's dimensions.
    """
    along = [value.shape[dim] if value.layer(dim) is not None else 1 for dim in range(value.ndim)[dims]]
    return torch.arange(start, start + prod(along), dtype=torch.int32).view(along)


def _repeated(numbers: Tensor, shape: tuple[int, ...], once: set[int]) -> Tensor:
    """The numbers repeated to a shape, except along the dimensions in `once`."""
    return numbers.expand([1 if dim in once else size for dim, size in enumerate(shape)])


def _once(numbers: Tensor, value: Labelled, first: int = 0) -> Tensor:
    """Undo the repetition along dimensions without labels; dimensions are those of `value` from `first` on."""
    for dim in range(numbers.ndim):
        if numbers.shape[dim] > 1 and numbers.stride(dim) == 0 and value.layer(first + dim) is None:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def _equal(numbers: Tensor, got: Tensor) -> bool:
    if any(size not in (1, other) for size, other in zip(numbers.shape, got.shape, strict=True)):
        return False  # some ops return other shapes if nothing is left
    numbers = numbers.expand(got.shape)
    for dim in range(got.ndim):
        if got.shape[dim] > 1 and numbers.stride(dim) == got.stride(dim) == 0:
            numbers, got = numbers.narrow(dim, 0, 1), got.narrow(dim, 0, 1)
    return torch.equal(numbers, got)


def only_moves(node: fx.Node) -> bool:
    """Whether all ATen ops that a traced call ran only move elements and compute nothing."""
    return bool(node.meta["ops"]) and set(node.meta["ops"]) <= _MOVES


def commutes(node: fx.Node, call: Call, shapes: SlimShapes, slim: Mapping[fx.Node, Any]) -> bool:
    """Whether `call` on slimmed data gives the slimmed result of the traced call, index by index.

    Args:
        node: the traced call, which only moves data.
        call: target, arguments and keyword arguments of the call in the rewritten forward.
        shapes: what stays of the tensors.
        slim: the slimmed values of the nodes before this one.
    """
    ops, (target, _, _) = set(node.meta["ops"]), call
    if ops <= _REORDERING:
        return True
    operands = [leaf for source in node.all_input_nodes for leaf in tensors_of(source.meta["val"])]
    operands = [*{id(leaf): leaf for leaf in operands}.values()]
    results = tensors_of(node.meta["val"])
    if target == node.target and all(map(shapes.is_whole, (*operands, *results))):
        return True
    if ops <= _RESHAPING and (len(operands) == 1 or target in _TO_SHAPE_OF_ANOTHER):
        (result,) = results
        return _reshapes(operands[0], result, shapes)
    return _moves_numbers(node, call, operands, results, shapes, slim)


def _moves_numbers(
    node: fx.Node, call: Call, operands: list[Tensor], results: list[Tensor], shapes: SlimShapes,
    slim: Mapping[fx.Node, Any],
) -> bool:  # fmt: skip
    """Run both calls on numbers: slimming the traced call's results has to give the results of the other call."""
    target, args, kwargs = call
    once = _dims_to_skip(node, [*operands, *results], shapes)
    whole, slimmed, start = {}, {}, 0
    for leaf in operands:
        labels = shapes.labels(leaf)
        numbers = _numbers(labels, start)
        start += numbers.numel()
        whole[id(leaf)] = _repeated(numbers, leaf.shape, once)
        slimmed[id(leaf)] = _repeated(shapes.mask.slim(numbers, labels), shapes.shape(leaf), once)
    # Numbers that are repeated can't be viewed, only reshaped.
    plain, other = (_RESHAPES.get(move, move) for move in (node.target, target))
    before = run_call(node.op, plain, node.args, node.kwargs, lambda n: swap_tensors(n.meta["val"], whole))
    after = run_call(
        node.op, other, args, kwargs,
        lambda n: swap_tensors(n.meta["val"], slimmed) if tensors_of(n.meta["val"]) else slim[n],
    )  # fmt: skip
    return all(
        _equal(shapes.mask.slim(_once(moved, labels), labels), got)
        for moved, got, labels in zip(tensors_of(before), tensors_of(after), map(shapes.labels, results), strict=True)
    )


def _dims_to_skip(node: fx.Node, tensors: list[Tensor], shapes: SlimShapes) -> set[int]:
    """Dimensions that the check of a roll or a concatenation can skip, because nothing is labelled along them."""
    dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims")
    flattened = dims is None or dims in ((), [])
    ops, values = set(node.meta["ops"]), [shapes.labels(tensor) for tensor in tensors]
    if not ops <= _ROLLING_OR_JOINING or (ops <= _ROLLING and flattened) or len({v.ndim for v in values}) > 1:
        return set()
    return set(range(values[0].ndim)).difference(*map(labelled_dims, values))


def _reshapes(operand: Tensor, result: Tensor, shapes: SlimShapes) -> bool:
    """As `commutes`, for a tensor that is reshaped to the right shape.

    Where the same dimensions become one another before and after slimming, each part is checked by itself: a kernel
    that is flattened along its inputs then needs as many numbers as it has inputs and outputs, not one an element.
    """
    slim = shapes.shape(operand), shapes.shape(result)
    found = list(parts(operand.shape, result.shape))
    if 0 in slim[0] or list(parts(*slim)) != found:
        found = [(slice(0, operand.ndim), slice(0, result.ndim))]
    return all(_part_reshapes(operand, result, old, new, shapes) for old, new in found)


def _part_reshapes(operand: Tensor, result: Tensor, old: slice, new: slice, shapes: SlimShapes) -> bool:
    """Whether these dimensions of one tensor become those of another, index by index."""
    of, to = shapes.labels(operand), shapes.labels(result)
    numbers = _numbers(of, 0, old)
    before = reshaped(numbers, operand.shape[old], result.shape[new])
    slim = shapes.mask.slim(numbers, of, old.start)
    after = reshaped(slim, shapes.shape(operand)[old], shapes.shape(result)[new])
    return _equal(shapes.mask.slim(_once(before, to, new.start), to, new.start), after)
