"""What stands in tuples, lists and dicts that calls are given and give, tensors above all, and in graphs of calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

_ONE = frozenset((bool, int, float, str, type(None)))


def leaves_of(value: Any) -> list[Any]:
    """What pytree's `tree_leaves` gives, in a fraction of its time for what is usual."""
    kind = type(value)
    if kind in _ONE or isinstance(value, Tensor):
        return [value]
    if kind is tuple or kind is list:
        return [leaf for item in value for leaf in leaves_of(item)]
    if kind is dict:
        return [leaf for item in value.values() for leaf in leaves_of(item)]
    return tree_leaves(value)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a value, in order."""
    if isinstance(value, Tensor):  # as it mostly is
        return [value]
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def tensors_at(node: fx.Node) -> list[Tensor]:
    """Tensors that go into a node, and those that come out."""
    values = [source.meta["val"] for source in node.all_input_nodes] + [node.meta["val"]]
    return tensors_of(values)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments, which fx declares as a union of all that may be in a graph."""
    return node.args


def all_tensors(graph: fx.Graph) -> list[Tensor]:
    """Every tensor that a node of the graph stands for."""
    return [tensor for node in graph.nodes for tensor in tensors_of(node.meta.get("val"))]
