"""Values of dead branches: which they are, and whether a constant for each channel says all of them.

Such a value comes from a kernel without a live input, so it is the same for every input. A constant that is read off
the example inputs must also be right for inputs of other sizes. So what depends on sizes is not taken for constant: a
sum over positions, a padded convolution of which the example has no more than one position. And the constant has size 1
along every dimension but those of the channels, so something else must give the result its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewriters.analysis import Analysis
from rewriters.forwards import labelled_dims, only_moves
from rewriters.labelling import ALWAYS, Labelled
from rewriters.labelling.rules import elementwise, find_rule
from rewriters.recording import args_of, is_draw, leaves_of, tensors_of


def constant_nodes(analysis: Analysis, live: Tensor) -> tuple[set[fx.Node], set[fx.Node]]:
    """Recorded nodes whose value depends neither on the model's inputs any more nor on random numbers, and those whose
    does.

    The values of parameters, and what is computed from them alone, are in neither set.
    """
    starved = _starved_weights(analysis, live)
    constant: set[fx.Node] = set()
    varying: set[fx.Node] = set()
    for node in analysis.captures[0].graph.nodes if starved else ():
        sources = set(node.all_input_nodes)
        if node.op == "call_function" and starved & analysis.labelling.kernels_of(node):
            constant.add(node)
        elif node.op == "placeholder" or sources & varying or is_draw(node.target, node.args, node.kwargs):
            varying.add(node)
        elif node.op == "call_function" and sources & constant:
            (varying if _depends_on_sizes(node, analysis.labelling.values) else constant).add(node)
    return constant, varying


def _starved_weights(analysis: Analysis, live: Tensor) -> set[str]:
    """Kernels without a live input channel."""
    classes = analysis.channel_map.classes
    sides = (kernel.input_side for kernel in analysis.channel_map.kernels if kernel.input_side in classes)
    return {side.tensor for side in sides if not (classes[side] == ALWAYS).any() and not live[classes[side]].any()}


_TOTALS = {
    torch.ops.aten.sum, torch.ops.aten.nansum, torch.ops.aten.prod, torch.ops.aten.cumsum, torch.ops.aten.cumprod,
    torch.ops.aten.norm, torch.ops.aten.linalg_vector_norm, torch.ops.aten.logsumexp, torch.ops.aten.count_nonzero,
}  # fmt: skip
"""Reductions whose result grows with the number of equal elements."""

_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm}


def _depends_on_sizes(node: fx.Node, labels: Mapping[fx.Node, Any]) -> bool:
    """Whether a call on equal positions may give another result if there are more or fewer of them."""
    op, args, value = getattr(node.target, "overloadpacket", None), args_of(node), node.meta["val"]
    if op is torch.ops.aten.convolution:
        return any(args[4]) and 1 in value.shape[2:]
    if op in _TOTALS:
        before = labels[args[0]]
        return any(before.layer(dim) is None for dim in _totalled(node, before.ndim))
    if op in _PRODUCTS and all(isinstance(labels.get(one), Labelled) for one in args[:2]):
        return labels[args[0]].layer(value.ndim - 1) is None and not any(map(_is_average, args[:2]))
    return False


def _totalled(node: fx.Node, ndim: int) -> list[int]:
    """The dimensions that a reduction takes together."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = args_of(node)[names.index("dim")] if "dim" in names else None
    dims = [dims] if isinstance(dims, int) else dims or range(ndim)
    return [dim % ndim for dim in dims] if ndim else []


def _is_average(node: fx.Node) -> bool:
    """Whether these are the weights of a mean, from a softmax: the more there are, the smaller they are."""
    while node.op == "call_function" and node.all_input_nodes:
        if getattr(node.target, "overloadpacket", None) in (torch.ops.aten._softmax, torch.ops.aten.softmax):
            return True
        node = node.all_input_nodes[0]
    return False


@dataclass(frozen=True)
class Meeting:
    """A constant value in a traced forward, and the calls in which it meets the rest.

    Attributes:
        value: the node of the value.
        users: calls that give the same result if the constant has size 1 along all but the channels' dimensions.
    """

    value: fx.Node
    users: tuple[fx.Node, ...]


def meetings(graph: fx.Graph, constant_values: set[int], varying_values: set[int]) -> list[Meeting]:
    """Where constant values meet the rest element by element, in the graph's order.

    Args:
        graph: a traced forward.
        constant_values: ids of the recorded values that are constant.
        varying_values: ids of those that depend on the model's inputs.
    """
    constant: set[fx.Node] = set()
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        sources, ids = set(node.all_input_nodes), {id(leaf) for leaf in leaves_of(node.meta.get("val"))}
        if node.op == "call_module" and ids & constant_values:
            constant.add(node)
        elif sources & varying or ids & varying_values or node.meta.get("draws"):
            varying.add(node)
        elif node.op in ("call_function", "call_method") and sources and sources <= constant:
            constant |= set() if _computes_with_sizes(node) else {node}
    found = []
    for node in graph.nodes:
        if node in constant and isinstance(node.meta["val"], Tensor):
            users = tuple(user for user in node.users if user not in constant and _broadcasts(user, node, varying))
            found += [Meeting(node, users)] if users else []
    return found


def _computes_with_sizes(node: fx.Node) -> bool:
    """Whether a call's elements depend on a number, which may be a size: only calls that move data may take one."""
    takes = any(not tensors_of(source.meta["val"]) for source in node.all_input_nodes)
    makes = bool(tensors_of(node.meta["val"]))
    return takes and makes and not only_moves(node)


def _broadcasts(user: fx.Node, constant: fx.Node, varying: set[fx.Node]) -> bool:
    """Whether `user` gives the same result if the constant has size 1 along all but the channels' dimensions.

    Another operand has to give the result its shape, whatever the inputs' sizes: a parameter can't.
    """
    ops, value = user.meta.get("ops") or (), user.meta.get("val")
    others = [source.meta["val"] for source in user.all_input_nodes if source in varying]
    same = isinstance(value, Tensor) and any(isinstance(o, Tensor) and o.shape == value.shape for o in others)
    return bool(ops) and all(find_rule(op) is elementwise.elementwise for op in ops) and same


def one_position(value: Tensor, labels: Labelled) -> Tensor:
    """The channels at the first position of the first sample: of size 1 along each dimension without labels."""
    for dim in set(range(value.ndim)) - labelled_dims(labels):
        value = value.narrow(dim, 0, 1)
    return value


def uniform(value: Tensor, labels: Labelled) -> Tensor | None:
    """The value of each channel, or None if it differs from position to position.

    Positions have labels too where a table of them was added; then the value has two layers.
    """
    first = one_position(value, labels)
    return first.clone() if len(labels.layers) < 2 and torch.equal(first.expand_as(value), value) else None
